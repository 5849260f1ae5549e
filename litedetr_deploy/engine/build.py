"""An ONNX model, or the weights that one is made from, to a verified engine."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..artifact import ENGINE_SUFFIXES, METADATA_KEY, check_file, sha256
from ..errors import CheckFailed, LiteDetrError
from ..runtime import cuda
from ..runtime.session import OnnxSession, check_op_version
from ..runtime.tensorrt import MODULES, TensorRTSession, record_path
from ..verify.engine import verify_engine
from . import api, known_bad, profile

FIRST_MISREAD_OPSET = 20  # of GridSample
ATTENTION = {"tensorrt": "op", "tensorrt-rtx": "gather"}
# For which TensorRT-RTX builds when nothing is said.
RTX_TARGETS = ("8.0", "8.6", "8.9", "12.0")


@dataclass
class EngineReport:
    """What was built; `<path>.json` holds the same, for the session and for people."""

    path: str
    backend: str
    version: str  # of the backend
    onnx: dict  # name and sha256 of the model it was built from
    metadata: dict  # what `litedetr export` wrote into that
    shapes: dict[str, list]  # input -> smallest, best and largest shape
    options: dict
    warnings: list[str]  # what is known against this version
    gpu: str | None = None  # that it was built on
    compute_capabilities: list[str] = field(default_factory=list)  # that it was built for
    plugin: dict | None = None  # name and sha256 of the plugin library, version of its ops
    plugin_inside: bool = False  # the engine brings its plugins
    size_bytes: int = 0
    sha256: str = ""
    seconds: float = 0.0
    network_types: dict = field(default_factory=dict)  # layers of the network that give fp16, bf16, int8
    layer_types: dict | None = None  # of the engine, by its inspector
    not_inspected: str | None = None  # why
    verification: list[dict] = field(default_factory=list)
    not_verified: str | None = None  # why

    @property
    def passed(self) -> bool:
        precision = self.metadata["precision"]
        typed = self.layer_types is None or precision == "fp32" or self.layer_types[precision] > 0
        return typed and all(row["passed"] for row in self.verification)

    def to_dict(self) -> dict:
        return {**asdict(self), "passed": self.passed}


def build_engine(
    model,
    path: str | os.PathLike,
    backend: str = "tensorrt",
    batch: Sequence[int] | None = None,
    image_size: Sequence[tuple[int, int]] | None = None,
    precision: str = "fp32",
    variant: str | None = None,
    compute_capabilities: Sequence[str] = (),
    timing_cache: str | os.PathLike | None = None,
    workspace: float | None = None,
    optimization_level: int | None = None,
    version_compatible: bool = False,
    hardware_compatibility: str = "none",
    tf32: bool = False,
    allow_known_bad: bool = False,
    verify: bool = True,
    images=None,
    progress: Callable = lambda stage, done=0, total=None: None,
) -> EngineReport:
    """Build an engine, look into it and compare it with the ONNX model.

    model: path of an ONNX model of `litedetr export`; or a checkpoint, the name of weights that come with the package,
        or what `load_model` returned, which is exported first, with the attention that `backend` takes.
    path: of the engine, .plan or .engine.  `<path>.json` describes it, `<path>.layers.json` lists its layers.
    backend: 'tensorrt', on the GPU that it is for; 'tensorrt-rtx', which needs no GPU.
    batch: smallest, best and largest batch; 1, 1 and 4 when not given.
    image_size: (height, width), one or the smallest, best and largest, for a graph of dynamic size.  Of weights one is
        the size that they are exported for (800x1333), several make the graph dynamic.
    precision, variant: of an export, see `export_onnx` and `load_model`.
    compute_capabilities: such as '8.6', that TensorRT-RTX builds for; those of RTX_TARGETS when not given.
    timing_cache, workspace, optimization_level, version_compatible, hardware_compatibility, tf32: see `api.Options`.
    allow_known_bad: build with a version that is known to go wrong; the report's `warnings` say how.
    images: pictures to verify with; None: the package draws one.
    progress: called as progress(stage, done, total) when a stage begins, and while TensorRT builds.

    The files appear complete or not at all.  Without a GPU the engine cannot be looked into or compared: the report
    says so.  A comparison that fails is not an error: see the report's `passed`.  Raises LiteDetrError for wishes that
    cannot be met, and CheckFailed where the graph's precision is lost before anything is built.
    """
    start = time.monotonic()
    if backend not in MODULES:
        raise LiteDetrError(f"backend is {backend!r}; it must be {' or '.join(map(repr, MODULES))}.")
    path = Path(path)
    if path.suffix.lower() not in ENGINE_SUFFIXES:
        raise LiteDetrError(f"the engine is {path}; its name must end in {' or '.join(ENGINE_SUFFIXES)}.")
    if backend == "tensorrt-rtx":
        compute_capabilities = compute_capabilities or RTX_TARGETS
    options = api.Options(
        tuple(compute_capabilities), Path(timing_cache) if timing_cache else None, workspace, optimization_level,
        version_compatible, hardware_compatibility, tf32,
    )  # fmt: skip
    options.check(backend)
    profile.check(batch, image_size)
    onnx = _onnx_path(model)
    graph = _Graph(onnx) if onnx else None
    if graph:
        graph.check(backend)
    progress(f"start {backend}")
    builder = api.Builder(backend)
    builder.check(options)
    try:
        staging = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise LiteDetrError(
            f"{path} cannot be written: {error.strerror}. Choose a folder that exists and is yours to write."
        ) from error
    with staging as folder:
        if graph is None:
            onnx = Path(folder, "model.onnx")
            _export(model, onnx, backend, image_size, precision, variant, verify, images, progress)
            graph = _Graph(onnx)
        gpus = (builder.gpu.compute_capability,) if backend == "tensorrt" else options.compute_capabilities
        warnings = known_bad.gate(
            known_bad.Target(
                backend,
                api.version_numbers(builder.version),
                graph.precision,
                graph.operators,
                gpus,
                known_bad.find_jetpack(),
            ),
            allow_known_bad,
        )
        progress("read the ONNX model")
        uses_plugin = graph.metadata["attention"] == "op"
        if uses_plugin:
            builder.load_plugins()
        network = builder.parse(onnx)
        inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
        shapes = profile.shapes(inputs, batch, image_size)
        types = builder.count_types()
        if graph.precision != "fp32" and not types[graph.precision]:
            raise CheckFailed(
                f"{graph.path} says that its precision is {graph.precision}, and {backend} "
                f"{builder.version} reads no layer of that type in it. Export the model again."
            )
        report = EngineReport(
            str(path), backend, builder.version, {"name": graph.path.name, "sha256": sha256(graph.path)},
            graph.metadata, shapes, _plain(options), warnings, compute_capabilities=list(gpus), network_types=types,
        )  # fmt: skip
        if backend == "tensorrt":
            report.gpu = builder.gpu.name
        if uses_plugin:
            report.plugin = {
                "name": builder.plugins.name,
                "sha256": sha256(builder.plugins),
                "op_version": graph.metadata["op_version"],
            }
            report.plugin_inside = version_compatible
        stage = "build the engine"
        progress(stage, 0, 1)
        plan = Path(folder, path.name)
        plan.write_bytes(builder.build(shapes, options, lambda done: progress(stage, done, 1)))
        report.size_bytes, report.sha256 = plan.stat().st_size, sha256(plan)
        record = record_path(plan)
        record.write_text(json.dumps(report.to_dict()))
        layers = _examine(report, builder.trt, plan, onnx, verify, images, progress)
        report.seconds = round(time.monotonic() - start, 1)
        record.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        targets = {record: record_path(path), plan: path}
        table = Path(f"{path}.layers.json")
        table.unlink(missing_ok=True)  # of an engine that was here before
        if layers is not None:
            staged = Path(folder, table.name)
            staged.write_text(json.dumps(layers, indent=2) + "\n")
            targets[staged] = table
        for file, target in targets.items():
            os.replace(file, target)
    return report


class _Graph:
    """What of an ONNX file matters before it is parsed."""

    def __init__(self, path: Path):
        try:
            import onnx
        except ImportError as error:
            raise LiteDetrError(f"onnx cannot be imported ({error}). Install it with `pip install onnx`.") from error
        try:
            proto = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf's own error classes differ between its implementations
            raise LiteDetrError(f"{path} is not an ONNX model, or a damaged one: {error}.") from error
        self.path = path
        entries = {entry.key: entry.value for entry in proto.metadata_props}
        if METADATA_KEY not in entries:
            raise LiteDetrError(
                f"{path} was not made by `litedetr export` (it has no metadata {METADATA_KEY!r}). "
                "Export the model with it, or build with trtexec."
            )
        self.metadata = json.loads(entries[METADATA_KEY])
        self.precision = self.metadata["precision"]
        self.operators = frozenset(node.op_type for node in proto.graph.node)
        self.opset = next(opset.version for opset in proto.opset_import if opset.domain in ("", "ai.onnx"))

    def check(self, backend: str) -> None:
        """Raise LiteDetrError for a graph that `backend` cannot take."""
        check_op_version(self.path, self.metadata)
        if backend == "tensorrt-rtx" and self.metadata["attention"] == "op":
            raise LiteDetrError(
                f"{self.path} holds the fused attention ops, and TensorRT-RTX has no plugins to run "
                "them. Export the model with `litedetr export --attention gather`, or give its "
                "checkpoint to `litedetr build`, which exports the right graph itself."
            )
        if "GridSample" in self.operators and self.opset >= FIRST_MISREAD_OPSET:
            raise LiteDetrError(
                f"{self.path} holds GridSample nodes of opset {self.opset}: from opset "
                f"{FIRST_MISREAD_OPSET} on, TensorRT's parser reads their 'linear' as nearest without "
                "a word (NVIDIA/TensorRT issue 4646). Export the model with --attention op or gather."
            )


def _onnx_path(model) -> Path | None:
    """The path of an ONNX model; None for what has to be exported first."""
    if not isinstance(model, (str, os.PathLike)) or Path(model).suffix.lower() != ".onnx":
        return None
    check_file(model, "an ONNX model that `litedetr export` made, or of a checkpoint")
    return Path(model)


def _export(model, onnx, backend, image_size, precision, variant, verify, images, progress):
    progress("load PyTorch and the checkpoint")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise LiteDetrError(
            f"{model} is not an .onnx file, so it would be exported first, and PyTorch cannot be "
            f"imported ({error}). Install it with `pip install litedetr-deploy[export]`."
        ) from error
    from ..export.export import export_onnx
    from ..model.checkpoints.official import load_model

    if isinstance(model, (str, os.PathLike)):
        model = load_model(os.fspath(model), variant)
    sizes = {tuple(size) for size in image_size} if image_size else {(800, 1333)}
    report = export_onnx(
        model, onnx, attention=ATTENTION[backend], precision=precision,
        image_size=sizes.pop() if len(sizes) == 1 else None, verify=verify, images=images, progress=progress,
    )  # fmt: skip
    if not report.passed:
        failed = next(row for row in report.verification if not row["passed"])
        raise CheckFailed(
            f"the exported graph does not agree with PyTorch ({failed['case']}, {failed['quantity']}: "
            f"{failed['difference']:.1e}, allowed {failed['tolerance']:.1e}), so no engine was built. "
            "Look at `litedetr export` of the same weights."
        )


def _examine(report, trt, plan, onnx, verify, images, progress):
    """Inspect and verify the engine as far as this machine can; return the inspector's layers, None without a GPU."""
    try:
        gpu = cuda.find_gpu()
        if report.backend == "tensorrt-rtx" and gpu.compute_capability not in report.compute_capabilities:
            raise LiteDetrError(
                f"the engine is for compute capability {', '.join(report.compute_capabilities)}, and "
                f"{gpu.name} has {gpu.compute_capability}"
            )
    except LiteDetrError as error:
        report.not_inspected = report.not_verified = str(error)
        return None
    progress("inspect the engine")
    layers = api.inspect(trt, gpu, plan, report.to_dict())
    report.layer_types = api.count_layer_types(layers)
    if not verify:
        report.not_verified = "it was not asked for"
    elif report.metadata["precision"] == "bf16":
        report.not_verified = "ONNX Runtime's CPU does not compute in bfloat16"
    else:
        smallest, best, largest = report.shapes["images"]
        session = TensorRTSession(plan)
        try:
            report.verification = verify_engine(
                session, OnnxSession(onnx), report.metadata["precision"], (smallest[0], largest[0]),
                sorted({best[2:], largest[2:]}), images, progress,
            )  # fmt: skip
        finally:
            session.close()
    return layers


def _plain(options: api.Options) -> dict:
    values = asdict(options)
    return values | {"timing_cache": values["timing_cache"] and str(values["timing_cache"])}
