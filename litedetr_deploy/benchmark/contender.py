"""A detector ready to be timed, in a process of its own, with the threads and the memory to itself.

`Worker` starts the process and talks to it; `Job` says what runs there.  The process ends when the other end of its
pipe does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..artifact import load_onnx
from ..errors import LiteDetrError
from ..verify.reference import INDICES, LOGITS, SCORES, Weights
from .harness import Contender
from .packages import is_installed
from .parts import Watched, onnxruntime_parts, torch_parts
from .plan import Spec
from .timing import captured

PROBES = (SCORES, INDICES)


@dataclass(frozen=True)
class Job:
    """What a process needs.

    file: the artifact, which PyTorch does not read; images: an .npz with `images` [1, 3, H, W]; weights: of PyTorch.
    """

    spec: Spec
    file: Path
    images: Path
    weights: Weights | None = None


class WorkerFailed(LiteDetrError):
    """The message is one line."""


class Worker:
    """An engine in a process of its own, loaded and run once.  Raises WorkerFailed where that, or `ask`, fails."""

    def __init__(self, job: Job):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, job), daemon=True)
        self._process.start()
        other.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def ask(self, question: str, *arguments):
        """Return what the method `question` of the engine returns."""
        with contextlib.suppress(OSError):  # it ended; `_receive` says why
            self._pipe.send((question, *arguments))
        return self._receive()

    def close(self) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def _receive(self):
        try:
            succeeded, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            reason = "was killed, likely for want of memory" if code == -signal.SIGKILL else f"ended with {code}"
            raise WorkerFailed(f"its process {reason}") from None
        if not succeeded:
            raise WorkerFailed(answer)
        return answer


def _serve(pipe, job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that ends this one
    try:
        engine = open_engine(job)
        engine.call()
        engine.call()
        engine.peak = peak_memory()  # before a check and a profile add to it
        pipe.send((True, None))
        while True:
            question, *arguments = pipe.recv()
            pipe.send((True, getattr(engine, question)(*arguments)))
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        with contextlib.suppress(OSError):
            pipe.send((False, text if isinstance(error, LiteDetrError) else text.splitlines()[0]))


def peak_memory() -> int | None:
    """Return the bytes that were resident in this process at most."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) << 10 if found else None


def open_engine(job: Job) -> Engine:
    with np.load(job.images) as file:
        images = np.repeat(file["images"], job.spec.batch, axis=0)
    return _ENGINES[job.spec.way.engine](job, images)


class Engine(Contender):
    """A detector in this process, ready to be called.  outputs: by name, as `Reference.check` takes them."""

    peak: int | None = None

    def __init__(self, job: Job, images: np.ndarray):
        self.job, self.spec, self.images = job, job.spec, job.spec.batch

    def outputs(self) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def memory(self) -> int | None:
        return self.peak


class _OnnxRuntime(Engine):
    def __init__(self, job: Job, images: np.ndarray):
        super().__init__(job, images)
        from ..runtime.session import create_session

        self._providers: list = ["CPUExecutionProvider"]
        if self.spec.device == "cuda":
            self._providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))  # FP32 is what the row says
        self._session = create_session(job.file, self._providers, self.spec.threads)
        self._feed = _feed({value.name for value in self._session.get_inputs()}, images)
        self._binding = self._bind() if self.spec.device == "cuda" else None

    def _bind(self):
        """Inputs and outputs that stay on the device: copies over the bus are the application's choice."""
        from onnxruntime import OrtValue

        binding = self._session.io_binding()
        for name, array in self._feed.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array, "cuda", 0))
        for output in self._session.get_outputs():
            binding.bind_output(output.name, "cuda")
        return binding

    def call(self):
        if self._binding is None:
            return self._session.run(None, self._feed)
        return self._session.run_with_iobinding(self._binding)  # waits for the device

    def outputs(self) -> dict[str, np.ndarray]:
        session = self._probed() or self._session
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, self._feed)))

    def _probed(self):
        """Return a session on the same graph that gives PROBES as well; None where it has none, or onnx is missing."""
        if not is_installed("onnx"):
            return None
        import onnx

        from ..runtime.session import create_session

        proto = load_onnx(self.job.file)
        known = {name for node in proto.graph.node for name in node.output}
        if not set(PROBES) <= known:
            return None
        there = {output.name for output in proto.graph.output}
        wanted = [name for name in (*PROBES, LOGITS, "pred_boxes") if name in known and name not in there]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        return create_session(proto.SerializeToString(), self._providers, self.spec.threads)

    def parts(self, calls: int) -> Watched | None:
        if self.spec.device != "cpu" or not is_installed("onnx"):  # the CUDA provider's profile times launches
            return None
        return onnxruntime_parts(self.job.file, self._feed, calls, self.spec.threads)


class _OpenVino(Engine):
    def __init__(self, job: Job, images: np.ndarray):
        super().__init__(job, images)
        self._compiled = self._compile()
        names = {name for value in self._compiled.inputs for name in value.get_names()}
        self._feed = _feed(names, images)

    def _compile(self, probes: tuple[str, ...] = ()):
        import openvino

        core = openvino.Core()
        model = core.read_model(self.job.file)
        if probes:
            there = {name for value in model.outputs for name in value.get_names()}
            model.add_outputs([name for name in probes if name not in there])
        settings = {
            "INFERENCE_NUM_THREADS": self.spec.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        return core.compile_model(model, "CPU", settings)

    def call(self):
        return self._compiled(self._feed, share_inputs=True, share_outputs=True)  # no copies

    def outputs(self) -> dict[str, np.ndarray]:
        compiled = self._compile(PROBES)
        values = compiled(self._feed)
        return {name: np.array(values[value]) for value in compiled.outputs for name in value.get_names()}


class _TensorRt(Engine):
    """With the copies over the bus: the session takes and gives arrays of the host."""

    def __init__(self, job: Job, images: np.ndarray):
        super().__init__(job, images)
        from ..runtime.tensorrt import TensorRTSession

        self._session = TensorRTSession(job.file)
        self._feed = _feed(set(self._session.inputs), images)

    def call(self):
        return self._session.run(self._feed)

    def outputs(self) -> dict[str, np.ndarray]:
        return {name: np.array(value) for name, value in self.call().items()}


class _PyTorch(Engine):
    def __init__(self, job: Job, images: np.ndarray):
        super().__init__(job, images)
        import torch

        from ..model.deployed import Deployed
        from ..model.resnet import fold_frozen_batch_norm
        from .official import official_attention

        self._torch = torch
        torch.set_num_threads(self.spec.threads)
        torch.backends.cudnn.allow_tf32 = False  # FP32 is what the row says
        model = job.weights.model.to(self.spec.device)
        fold_frozen_batch_norm(model)  # as the export does
        self._deployed = Deployed(model, "raw").eval().to(self.spec.device)
        self._run = torch.compile(self._deployed, dynamic=False) if self.spec.way.mode == "compile" else self._deployed
        self._input = torch.from_numpy(images).to(self.spec.device)
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.spec.precision)
        # Weights that were cast outside of a CUDA graph would be gone when it runs.
        keep = self.spec.way.mode != "graph"
        self._cast = lambda: torch.autocast(self.spec.device, half, enabled=half is not None, cache_enabled=keep)
        self._attention = official_attention if self.spec.way.attention == "official" else contextlib.nullcontext
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.spec.device == "cuda" else None
        self._call = captured(self._forward) if self.spec.way.mode == "graph" else self._forward

    def _forward(self):
        with self._torch.inference_mode(), self._cast(), self._attention():
            return self._run(self._input)

    def call(self):
        if self._events is None:
            return self._forward()
        begin, end = self._events
        begin.record()
        output = self._call()
        end.record()
        end.synchronize()
        return output

    def device_seconds(self) -> float | None:
        return self._events[0].elapsed_time(self._events[1]) / 1e3 if self._events else None

    def outputs(self) -> dict[str, np.ndarray]:
        values = {name: value.cpu() for name, value in self.call().items()}
        return {name: (v.float() if v.is_floating_point() else v).numpy() for name, v in values.items()}

    def parts(self, calls: int) -> Watched | None:
        if self.spec.way.mode:  # compiled as one
            return None
        wait = self._torch.cuda.synchronize if self._events else lambda: None
        return Watched(torch_parts(self._deployed.detector, self._forward, calls, wait))


_ENGINES = {"onnxruntime": _OnnxRuntime, "openvino": _OpenVino, "tensorrt": _TensorRt, "pytorch": _PyTorch}


def _feed(inputs: set[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """What an artifact with these inputs is given: the images, their sizes, and a mask without padding."""
    n, _, height, width = images.shape
    known = {
        "images": images,
        "orig_target_sizes": np.array([[width, height]] * n, np.int64),
        "pixel_mask": np.zeros((n, height, width), bool),
    }
    return {name: known[name] for name in inputs}
