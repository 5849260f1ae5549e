"""A detector ready to be timed, in a process of its own, with the threads and the memory to itself."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import re
import signal
import subprocess
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from ..artifact import load_onnx
from ..errors import LiteDetrError
from ..model.paper import PUBLISHED
from ..ops import native
from ..runtime.tensorrt import read_record
from ..verify.probes import feed
from ..verify.reference import BOXES, INDICES, LOGITS, SCORES, Weights
from . import timing
from .harness import Contender, Result
from .packages import is_installed
from .parts import Watched, onnxruntime_parts, openvino_parts, torch_parts
from .plan import Cache, Spec, why_missing

PROBES = (SCORES, INDICES)


def _asked(question: str):
    return lambda detector, *arguments: detector.ask(question, *arguments)


class Detector(Contender):
    """A detector in a process of its own, whose engine answers for it; where that fails, in one line."""

    time, parts, keep_running = map(_asked, ("time", "parts", "keep_running"))

    def __init__(self, spec: Spec, cache: Cache, unchecked: bool = False):
        self.subject, self.name, self.key, self.images = spec, spec.name, repr(spec), spec.batch
        self._cache, self._unchecked = cache, unchecked
        self._process: BaseProcess | None = None

    def missing(self) -> str:
        return why_missing(self.subject, self._cache, self._unchecked)

    def open(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        process = context.Process(target=_serve, args=(other, *self._cache.engine(self.subject)), daemon=True)
        process.start()
        self._process = process
        other.close()
        self._peak = self.ask("warm_up")

    def memory(self) -> int | None:
        return self._peak

    def ask(self, question: str, *arguments):
        """Return what the method `question` of the engine returns."""
        try:
            with contextlib.suppress(OSError):  # it ended; its last answer says why
                self._pipe.send((question, *arguments))
            succeeded, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            reason = "was killed, likely for want of memory" if code == -signal.SIGKILL else f"ended with {code}"
            raise LiteDetrError(f"its process {reason}") from None
        if not succeeded:
            raise LiteDetrError(answer)
        return answer

    def check(self, result: Result) -> str:
        spec, reference = self.subject, self._cache.reference(self.subject)
        variant = self._cache.variant(spec)
        # On COCO val2017, of the published weights; an artifact may have been trained on anything.
        ap = next((model.ap for model in PUBLISHED if model.variant == variant and not spec.is_artifact), None)
        result.figures |= {"variant": variant, "gflops": reference.gflops, "ap": ap, "check": None, "trtexec_ms": None}
        if not reference.checks:
            return ""
        verdict = reference.check(self.ask("outputs"), spec.rounding)
        share = verdict.worst.share if verdict.passed else None
        result.figures |= {"check": [row.to_dict() for row in verdict.rows], "worst": share}
        return "" if verdict.passed else f"it does not agree with {verdict.against}: {verdict.why}"

    def finish(self, result: Result) -> None:
        if self.subject.way.engine == "tensorrt":
            result.figures["trtexec_ms"] = trtexec_median(self._cache.model(self.subject), self.subject)

    def close(self) -> None:
        if self._process:
            self._pipe.close()
            self._process.terminate()
            self._process.join()


def _serve(pipe, *arguments) -> None:
    """Answer for an engine until the other end of the pipe is closed, or something fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that ends this one
    try:
        engine = open_engine(*arguments)
        while True:
            question, *arguments = pipe.recv()
            pipe.send((True, getattr(engine, question)(*arguments)))
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        with contextlib.suppress(OSError):
            pipe.send((False, text if isinstance(error, LiteDetrError) else text.splitlines()[0]))


def open_engine(spec: Spec, *rest) -> Engine:
    engine = _ENGINES[spec.way.engine](spec, *rest)
    engine.open()
    return engine


class Engine(Contender):
    """A detector in this process.  pixels: an .npz with `images` [1, 3, H, W]; weights: of PyTorch alone."""

    def __init__(self, spec: Spec, file: Path, pixels: Path, weights: Weights | None = None):
        self.spec, self.file, self.weights, self.images = spec, file, weights, spec.batch
        with np.load(pixels) as arrays:
            self.pixels = np.repeat(arrays["images"], spec.batch, axis=0)

    def outputs(self) -> dict[str, np.ndarray]:
        """Return them by name, as `Reference.check` takes them."""
        return self.call()

    def warm_up(self) -> int | None:
        """Return the bytes that were resident in this process at most, before a check and a profile add to them."""
        self.call()
        self.call()
        status = Path("/proc/self/status")
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
        return int(found[1]) << 10 if found else None

    def feed(self, inputs: set[str]) -> dict[str, np.ndarray]:
        """Return what an artifact with these inputs is given: the images, their sizes, and a mask without padding."""
        return feed(inputs, self.pixels, np.zeros((len(self.pixels), *self.pixels.shape[2:]), bool))

    def probed(self) -> bytes | None:
        """Return the graph with PROBES, logits and boxes as outputs too; None where it has no PROBES, or the package
        onnx is not here to make outputs of them."""
        if not is_installed("onnx"):
            return None
        import onnx

        proto = load_onnx(self.file)
        known = {name for node in proto.graph.node for name in node.output}
        if not known.issuperset(PROBES):
            return None
        wanted = known.intersection((*PROBES, LOGITS, BOXES)) - {output.name for output in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        return proto.SerializeToString()


class _OnnxRuntime(Engine):
    def open(self) -> None:
        from ..runtime.session import create_session

        providers: list = ["CPUExecutionProvider"]
        if self.spec.device == "cuda":
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))  # FP32 is what the row says
        self._create = functools.partial(create_session, providers=providers, threads=self.spec.threads)
        self._session = self._create(self.file)
        names = {value.name for value in self._session.get_inputs()}
        self._feed = self.feed(names)
        if names - self._feed.keys():  # a model of others
            from ..verify.inputs import feed_any

            self._feed = feed_any(load_onnx(self.file, weights=False), self.pixels)
        self._run = functools.partial(self._session.run, None, self._feed)
        if self.spec.device == "cuda":
            from onnxruntime import OrtValue

            # Inputs and outputs stay on the device: copies over the bus are the application's choice.
            binding = self._session.io_binding()
            for name, array in self._feed.items():
                binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array, "cuda", 0))
            for output in self._session.get_outputs():
                binding.bind_output(output.name, "cuda")
            self._run = functools.partial(self._session.run_with_iobinding, binding)  # waits for the device

    def call(self):
        return self._run()

    def outputs(self) -> dict[str, np.ndarray]:
        probed = self.probed()
        session = self._create(probed) if probed else self._session
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, self._feed)))

    def parts(self, calls: int) -> Watched | None:
        if self.spec.device != "cpu" or not is_installed("onnx"):  # the CUDA provider's profile times launches
            return None
        return onnxruntime_parts(self.file, self._feed, calls, self.spec.threads)


class _OpenVino(Engine):
    def open(self) -> None:
        from ..runtime.openvino import OpenVinoSession

        spec = self.spec
        self._create = functools.partial(OpenVinoSession, threads=spec.threads, precision=spec.way.mode or None)
        self._session = self._create(self.file)
        self._feed = self.feed(set(self._session.inputs))

    def call(self):
        return self._session.run(self._feed, copy=False)

    def outputs(self) -> dict[str, np.ndarray]:
        probed = self.probed()
        return (self._create(probed) if probed else self._session).run(self._feed)

    def parts(self, calls: int) -> Watched | None:
        return openvino_parts(self.file, self._feed, calls, self.spec.threads, self.spec.way.mode or None)


class _TensorRt(Engine):
    """With the copies over the bus: the session takes and gives arrays of the host."""

    def open(self) -> None:
        from ..runtime.tensorrt import TensorRTSession

        self._session = TensorRTSession(self.file)
        self._feed = self.feed(set(self._session.inputs))

    def call(self):
        return self._session.run(self._feed)


class _PyTorch(Engine):
    def open(self) -> None:
        import torch

        from ..model.deployed import Deployed
        from ..model.resnet import fold_frozen_batch_norm
        from .official import official_attention

        way, device = self.spec.way, self.spec.device
        torch.set_num_threads(self.spec.threads)
        torch.backends.cudnn.allow_tf32 = False  # FP32 is what the row says
        model = self.weights.model
        fold_frozen_batch_norm(model)  # as the export does
        self._deployed = Deployed(model, "raw").eval().to(device)
        run = torch.compile(self._deployed, dynamic=False) if way.mode == "compile" else self._deployed
        pixels = torch.from_numpy(self.pixels).to(device)
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.spec.precision)
        attention = official_attention if way.attention == "official" else contextlib.nullcontext

        def forward():
            # Weights that were cast outside of a CUDA graph would be gone when it runs.
            cast = torch.autocast(device, half, enabled=half is not None, cache_enabled=way.mode != "graph")
            with torch.inference_mode(), cast, attention():
                return run(pixels)

        self._forward = timing.captured(forward) if way.mode == "graph" else forward
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device == "cuda" else None

    def call(self):
        if self._events is None:
            return self._forward()
        begin, end = self._events
        begin.record()
        output = self._forward()
        end.record()
        end.synchronize()
        return output

    def time(self, cold: bool = False) -> tuple[float, float | None]:
        seconds, _ = super().time(cold)
        return seconds, self._events[0].elapsed_time(self._events[1]) / 1e3 if self._events else None

    def outputs(self) -> dict[str, np.ndarray]:
        values = {name: value.cpu() for name, value in self.call().items()}
        return {name: (v.float() if v.is_floating_point() else v).numpy() for name, v in values.items()}

    def parts(self, calls: int) -> Watched | None:
        if self.spec.way.mode:  # compiled as one
            return None
        import torch

        wait = torch.cuda.synchronize if self._events else lambda: None
        return Watched(torch_parts(self._deployed.detector, self._forward, calls, wait))


_ENGINES = {"onnxruntime": _OnnxRuntime, "openvino": _OpenVino, "tensorrt": _TensorRt, "pytorch": _PyTorch}


def trtexec_median(plan: Path, spec: Spec) -> float | None:
    """Return the median latency, in milliseconds, that NVIDIA's own tool measures; None where it is absent or fails."""
    shapes = f"--shapes=images:{spec.shape.replace('x', 'x3x', 1)}"
    command = ["trtexec", f"--loadEngine={plan}", shapes, "--useCudaGraph", "--warmUp=1000", "--duration=5"]
    if spec.way.attention == "op" and not read_record(plan).get("plugin_inside"):
        command.append(f"--dynamicPlugins={native.library('tensorrt')}")
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return read_trtexec(subprocess.run(command, capture_output=True, text=True, timeout=600).stdout)
    return None


def read_trtexec(text: str) -> float | None:
    found = re.search(r"\] Latency: .*?\bmedian = ([\d.]+) ms", text)
    return float(found[1]) if found else None
