"""TensorRT's builder: the one place that knows how TensorRT 10.3 to 11.x and TensorRT-RTX differ.

- Networks are strongly typed, by a flag in 10 and always in 11; precision flags and calibrators, gone in 11, not used.
- HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY came with 10.9.
- TensorRT-RTX has no plugins and no timing cache, and builds for compute capabilities that are named: the current one
  needs a GPU.  Its versions count from 1.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LiteDetrError, nearest
from ..files import replaced_when_done
from ..runtime import cuda
from ..runtime.tensorrt import deserialize, import_tensorrt, load_plugins, message_logger

if TYPE_CHECKING:
    import tensorrt  # or tensorrt_rtx, which has the same classes

HARDWARE_COMPATIBILITY = {
    "none": "NONE", "ampere+": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY",
}  # fmt: skip
# As the metadata of a graph name them, and TensorRT's DataType.
PRECISIONS = {"fp16": "HALF", "bf16": "BF16", "int8": "INT8"}
# What the inspector calls them, as in 'Row major linear FP16 format' and 'Half'; and where: of a tensor as
# 'Format/Datatype' in 10, 'DataType' in 11, of weights as 'Type'.
_INSPECTED = {"fp16": r"\b(fp16|half)\b", "bf16": r"\b(bf16|bfloat16)\b", "int8": r"\bint8\b"}
_TYPE = r'"(?:format/datatype|datatype|type)": "([^"]*)"'
RTX_TARGETS = ("8.0", "8.6", "8.9", "12.0")  # for which TensorRT-RTX builds when nothing is said
POLL = 0.2  # seconds between looks at the build, while Ctrl-C is waited for


@dataclass(frozen=True)
class Options:
    """What a build can be asked for; None leaves TensorRT's default."""

    compute_capabilities: Sequence[str] = ()  # ('8.6', '12.0'); of TensorRT-RTX, RTX_TARGETS when not given
    timing_cache: str | os.PathLike | None = None  # read where it exists, and written
    workspace: float | None = None  # GiB of GPU memory that a layer may use besides its tensors
    optimization_level: int | None = None  # 0 (fastest build) to 5
    version_compatible: bool = False  # the engine runs in newer versions of TensorRT as well
    hardware_compatibility: str = "none"
    tf32: bool = False  # FP32 products may round their inputs to 10 bits
    batch: Sequence[int] | None = None  # smallest, best and largest; 1, 1 and 4 when not given
    # (height, width), one or the smallest, best and largest, for a graph of dynamic size
    image_size: Sequence[tuple[int, int]] | None = None

    def check(self, backend: str) -> None:
        """Raise LiteDetrError for what `backend` cannot be asked for."""
        level = self.hardware_compatibility
        if level not in HARDWARE_COMPATIBILITY:
            known = " or ".join(map(repr, HARDWARE_COMPATIBILITY)) + "." + nearest(level, HARDWARE_COMPATIBILITY)
            raise LiteDetrError(f"hardware_compatibility is {level!r}; it must be {known}")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise LiteDetrError(f"optimization_level is {self.optimization_level}; it must be 0 to 5.")
        if self.workspace is not None and self.workspace <= 0:
            raise LiteDetrError(f"workspace is {self.workspace}; it must be more than 0 GiB.")
        if backend == "tensorrt" and self.compute_capabilities:
            raise LiteDetrError(
                f"compute_capabilities is {', '.join(self.compute_capabilities)}, and TensorRT builds for the GPU that "
                "it builds on. Leave it out, or choose backend 'tensorrt-rtx'."
            )
        for name in ("timing_cache", "version_compatible", "hardware_compatibility"):
            if backend == "tensorrt-rtx" and getattr(self, name) != getattr(Options, name):
                fix = "Leave it out, or choose backend 'tensorrt'."
                raise LiteDetrError(f"{name} is given, and is not supported by the backend 'tensorrt-rtx'. {fix}")


class Builder:
    """Parses ONNX models and builds engines with `backend`, 'tensorrt' or 'tensorrt-rtx'.

    Raises LiteDetrError where that is not installed or, for 'tensorrt', where there is no GPU.
    """

    def __init__(self, backend: str):
        self.backend = backend
        self.trt = trt = import_tensorrt(backend)
        self.version = trt.__version__
        try:
            self.gpu = cuda.find_gpu() if backend == "tensorrt" else None
        except LiteDetrError as error:
            fix = "To build ahead of time, without a GPU, choose backend 'tensorrt-rtx'."
            raise LiteDetrError(f"TensorRT builds an engine on the GPU that it is for: {error} {fix}") from error
        self.logger = message_logger(trt)
        self._builder: tensorrt.Builder = trt.Builder(self.logger)
        self.plugins: Path | None = None

    def check(self, options: Options) -> None:
        """Raise LiteDetrError for what this version cannot be asked for."""
        level = HARDWARE_COMPATIBILITY[options.hardware_compatibility]
        if level not in self.trt.HardwareCompatibilityLevel.__members__:
            raise LiteDetrError(
                f"hardware_compatibility is {options.hardware_compatibility!r}, and TensorRT {self.version} does not "
                "have it. Choose 'ampere+', or install 10.9 or newer."
            )
        known = _compute_capabilities(self.trt) if options.compute_capabilities else {}
        if unknown := [one for one in options.compute_capabilities if one not in known]:
            raise LiteDetrError(
                f"the compute capability {unknown[0]} is not one that {self.backend} {self.version} builds for; these "
                f"are {', '.join(known)}."
            )

    def parse(self, onnx: Path, needs_plugins: bool = False) -> tensorrt.INetworkDefinition:
        """Return the network of an ONNX file; raise LiteDetrError for what the parser refuses."""
        if needs_plugins:
            self.plugins = load_plugins(self._builder.get_plugin_registry())
        self._network = self._builder.create_network(_network_flags(self.trt, self.backend))
        parser: tensorrt.OnnxParser = self.trt.OnnxParser(self._network, self.logger)
        if not _interruptible(lambda: parser.parse_from_file(str(onnx))):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            said = "; ".join(f"node {error.node_name() or error.node()}: {error.desc()}" for error in errors[:3])
            raise LiteDetrError(
                f"{self.backend} {self.version} cannot read {onnx}: {said or self._said()}. Export it again with "
                "`litedetr export --attention op` for TensorRT, `--attention gather` for TensorRT-RTX."
            )
        return self._network

    def count_types(self) -> dict[str, int]:
        """Return how many layers of the parsed network give fp16, bf16 and int8."""
        layers = [self._network.get_layer(i) for i in range(self._network.num_layers)]
        given = [{layer.get_output(i).dtype.name for i in range(layer.num_outputs)} for layer in layers]
        return {name: sum(of_trt in types for types in given) for name, of_trt in PRECISIONS.items()}

    def describe_tensors(self) -> dict[str, dict]:
        """Return type and shape of every input and output of the parsed network; -1 is a size that varies."""
        network = self._network
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        return {
            one.name: {"type": one.dtype.name, "shape": [one.shape[i] for i in range(len(one.shape))]}
            for one in (*inputs, *outputs)
        }

    def build(self, shapes: dict, options: Options, progress: Callable[[float], None]) -> bytes:
        """Return the serialized engine of the parsed network; raise LiteDetrError where TensorRT fails.

        shapes: input -> its smallest, best and largest shape; progress: called with the part that is done, 0 to 1, from
        another thread.  Ctrl-C cancels at the end of TensorRT's step; then KeyboardInterrupt is raised.
        """
        config = self._configure(shapes, options)
        monitor, cancel = _monitor(self.trt, progress)
        config.progress_monitor = monitor  # TensorRT holds no reference
        plan = _interruptible(lambda: self._builder.build_serialized_network(self._network, config), cancel)
        if plan is None:
            raise LiteDetrError(
                f"{self.backend} {self.version} cannot build the engine: {self._said()}. If memory is short, build for "
                "a smaller batch or image size, or with a smaller --workspace."
            )
        if options.timing_cache:
            with replaced_when_done(options.timing_cache) as temporary:
                temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
        return bytes(plan)

    def _configure(self, shapes: dict, options: Options) -> tensorrt.IBuilderConfig:
        trt, config = self.trt, self._builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspector; costs nothing at run time
        if not options.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace * 2**30))
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
            if self.plugins:
                config.plugins_to_serialize = [str(self.plugins)]
        level = HARDWARE_COMPATIBILITY[options.hardware_compatibility]
        if level != "NONE":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.__members__[level]
        if options.compute_capabilities:
            known = _compute_capabilities(trt)
            config.num_compute_capabilities = len(options.compute_capabilities)  # type: ignore[attr-defined]
            for i, one in enumerate(options.compute_capabilities):
                config.set_compute_capability(known[one], i)  # type: ignore[attr-defined]
        if options.timing_cache:
            self._read_timing_cache(config, Path(options.timing_cache))
        profile = self._builder.create_optimization_profile()
        for name, (smallest, best, largest) in shapes.items():
            profile.set_shape(name, smallest, best, largest)
        config.add_optimization_profile(profile)
        return config

    def _read_timing_cache(self, config: tensorrt.IBuilderConfig, path: Path) -> None:
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise LiteDetrError(
                f"TensorRT {self.version} cannot use the timing cache {path}: it is damaged, or of another version or "
                "GPU. Name another file, or remove this one."
            )

    def _said(self):
        return self.logger.errors[-1].strip()[:500] if self.logger.errors else "it does not say why"


def version_numbers(version: str) -> tuple[int, ...]:
    """'10.14.1.48' -> (10, 14, 1, 48)"""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:4])


def _network_flags(trt, backend: str) -> int:
    if backend == "tensorrt" and version_numbers(trt.__version__) >= (11,):
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _compute_capabilities(trt) -> dict:
    """'8.6' -> what TensorRT-RTX calls it"""
    found = {name: re.fullmatch(r"SM(\d+)(\d)", name) for name in trt.ComputeCapability.__members__}
    return {f"{match[1]}.{match[2]}": trt.ComputeCapability.__members__[name] for name, match in found.items() if match}


def _interruptible(work: Callable, cancel: Callable[[], None] = lambda: None):
    """Return `work()`, done in a thread of its own: in the main thread TensorRT's callbacks would swallow Ctrl-C, upon
    which this calls `cancel()`, waits for the end, and passes on KeyboardInterrupt."""
    future = Future()

    def run():
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    try:  # no ThreadPoolExecutor: it does not wait for a thread in whose start() Ctrl-C came
        threading.Thread(target=run, name="TensorRT").start()
        while not wait([future], POLL).done:
            pass
    except KeyboardInterrupt:
        cancel()
        wait([future])
        raise
    return future.result()


def _monitor(trt, progress):
    """Return a progress monitor that reports one fraction, and what cancels the build that it is told of."""
    phases, cancelled = Progress(), threading.Event()

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        def phase_start(self, phase, parent, steps):
            phases.start(phase, parent, steps)

        def step_complete(self, phase, step):
            progress(phases.step(phase, step))
            return not cancelled.is_set()

        def phase_finish(self, phase):
            phases.finish(phase)

    return Monitor(), cancelled.set


class Progress:
    """The part of a build that is done, 0 to 1, of phases that have steps, of which each can be a phase of its own."""

    def __init__(self):
        self._lock = threading.Lock()  # TensorRT calls from several threads
        self._phases = {}  # name -> [parent, steps, steps done]
        self._done = 0.0

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[phase] = [parent, max(steps, 1), 0]

    def step(self, phase: str, step: int) -> float:
        """Return the part of the whole that is done when step number `step`, from 0, of `phase` is."""
        with self._lock:
            if phase in self._phases:
                self._phases[phase][2] = step + 1
                part, name = 0.0, phase
                while name in self._phases:
                    name, steps, done = self._phases[name]
                    part = min((done + part) / steps, 1.0)
                self._done = max(self._done, part)  # a phase can come again
            return self._done

    def finish(self, phase: str) -> None:
        with self._lock:
            self._phases.pop(phase, None)


def inspect(trt, gpu: cuda.Gpu, plan: Path, record: dict) -> list[dict]:
    """Return the layers of an engine, one dict each, as TensorRT's inspector describes them; this needs the GPU."""
    logger = message_logger(trt)
    runtime: tensorrt.Runtime = trt.Runtime(logger)
    if record["plugin"] and not record["plugin_inside"]:
        load_plugins(runtime.get_plugin_registry())
    engine = deserialize(trt, runtime, logger, plan, record, gpu)
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return json.loads(text)["Layers"]


def count_layer_types(layers: list) -> dict[str, int]:
    """Return how many of the inspector's layers have inputs, outputs or weights in fp16, bf16 and int8."""
    texts = [" ".join(re.findall(_TYPE, json.dumps(layer).lower())) for layer in layers]
    return {name: sum(bool(re.search(pattern, text)) for text in texts) for name, pattern in _INSPECTED.items()}
