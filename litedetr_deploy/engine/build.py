"""An ONNX model, or the weights that one is made from, to a verified engine."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from .. import artifact
from ..artifact import CANNOT_TELL, ENGINE_SUFFIXES, FAILED, NOT_VERIFIED, sha256
from ..errors import CheckFailed, LiteDetrError, nearest, not_installed
from ..export.limits import ATTENTIONS, PRECISIONS
from ..files import folder_beside
from ..ops import schema
from ..runtime import cuda
from ..runtime.session import OnnxSession, check_op_version
from ..runtime.tensorrt import MODULES, TensorRTSession, record_path
from ..verify.engine import verify_engine
from ..verify.verdict import Verdict
from . import api, known_bad, profile
from .api import Options

FIRST_MISREAD_OPSET = 20  # of GridSample
ATTENTION = {"tensorrt": "op", "tensorrt-rtx": "gather"}


@dataclass
class EngineReport:
    """What was built; `<path>.json` holds the same, for the session and for people."""

    path: str
    backend: str
    version: str  # of the backend
    onnx: dict  # name and sha256 of the model it was built from
    metadata: dict  # what `litedetr export` wrote into that; the verdict on the engine is its `verification`
    shapes: dict[str, list]  # input -> smallest, best and largest shape
    options: dict
    warnings: list[str]  # what is known against this version, or against the model
    # Input or output -> its type, as TensorRT names it, and its shape in the network, -1 where a size varies.
    tensors: dict[str, dict] = field(default_factory=dict)
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
    verdict: Verdict = field(default_factory=lambda: Verdict("the ONNX model", "the engine"))

    @property
    def lost_precision(self) -> str:
        """The graph's precision where no layer of the engine has it, else ''."""
        precision = self.metadata["precision"]
        lost = self.layer_types is not None and precision != "fp32" and not self.layer_types[precision]
        return precision if lost else ""

    @property
    def passed(self) -> bool:
        """Whether no check failed; an engine that this machine cannot run is not compared, and passes."""
        return not self.lost_precision and self.verdict.status not in (FAILED, CANNOT_TELL)

    def to_dict(self) -> dict:
        properties = {"lost_precision": self.lost_precision, "passed": self.passed}
        return asdict(self) | {"verdict": self.verdict.to_dict()} | properties


def build_engine(
    model, path: str | os.PathLike, backend: str = "tensorrt", options: Options | None = None,
    precision: str = "fp32", variant: str | None = None, force_variant: bool = False,
    allow_known_bad: bool = False, allow_unverified: bool = False,
    verify: bool = True, images=None, progress: Callable = lambda stage, done=0, total=None: None, **single,
) -> EngineReport:  # fmt: skip
    """Build an engine, look into it and compare it with the ONNX model; return the report.

    Without a GPU the engine cannot be looked into or compared: the report says so.  A comparison that fails is not an
    error: see its `passed`.  The files appear complete or not at all.

    model: path of an ONNX model of `litedetr export`; or a checkpoint, the name of weights that come with the package,
        or what `load_model` returned, which is exported first, with the attention that `backend` takes.  Of weights,
        one image size is what they are exported for (800x1333), several make the graph dynamic.
    path: of the engine, .plan or .engine.  `<path>.json` describes it, `<path>.layers.json` lists its layers.
    backend: 'tensorrt', on the GPU that it is for; 'tensorrt-rtx', which needs no GPU.
    precision, variant, force_variant: of an export, see `export_onnx` and `load_model`.
    allow_known_bad: build with a version that is known to go wrong; the report's `warnings` say how.
    allow_unverified: build from a model that was not verified, or was changed since; `warnings` say so.
    images: to verify with; None: the package draws one.
    progress: called as progress(stage, done, total) when a stage begins, and while TensorRT builds.
    single: fields of `options`, as in batch=(1, 1, 4).

    Raises LiteDetrError for bad options, and for a model that is not verified; CheckFailed where the graph's precision
    is lost before anything is built.
    """
    start, path = time.monotonic(), Path(path)
    if backend not in MODULES:
        known = " or ".join(map(repr, MODULES)) + "." + nearest(backend, MODULES)
        raise LiteDetrError(f"backend is {backend!r}; it must be {known}")
    if path.suffix.lower() not in ENGINE_SUFFIXES:
        raise LiteDetrError(f"the engine is {path}; its name must end in {' or '.join(ENGINE_SUFFIXES)}.")
    options = replace(options or Options(), **single)
    if backend == "tensorrt-rtx" and not options.compute_capabilities:
        options = replace(options, compute_capabilities=api.RTX_TARGETS)
    options.check(backend)
    profile.check(options.batch, options.image_size)
    graph, doubt = None, ""
    if isinstance(model, (str, os.PathLike)) and Path(model).suffix.lower() == ".onnx":
        graph = _Graph(Path(model), backend)
        doubt = artifact.distrust(model, graph.metadata)
        if doubt and not allow_unverified:
            fix = "Export it again, or build with --allow-unverified (allow_unverified=True)."
            raise LiteDetrError(f"{model} {doubt}, so no engine is built of it. {fix}")
    progress(f"start {backend}")
    builder = api.Builder(backend)
    builder.check(options)
    checking = {"verify": verify, "images": images, "progress": progress}
    with folder_beside(path) as folder:
        if graph is None:
            onnx = folder / "model.onnx"
            _export(model, onnx, variant, force_variant, options.image_size, attention=ATTENTION[backend],
                    precision=precision, **checking)  # fmt: skip
            graph = _Graph(onnx, backend)
        gpus = (builder.gpu.compute_capability,) if builder.gpu else tuple(options.compute_capabilities)
        target = known_bad.Target(
            backend, api.version_numbers(builder.version), graph.precision, graph.operators, gpus,
            known_bad.find_jetpack(),
        )  # fmt: skip
        warnings = known_bad.gate(target, allow_known_bad) + ([f"{model} {doubt}"] if doubt else [])
        progress("read the ONNX model")
        uses_plugin = graph.metadata["attention"] == "op"
        network = builder.parse(graph.path, uses_plugin)
        inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
        shapes = profile.shapes(inputs, options.batch, options.image_size)
        types = builder.count_types()
        if graph.precision != "fp32" and not types[graph.precision]:
            raise CheckFailed(
                f"{graph.path} says that its precision is {graph.precision}, and {backend} {builder.version} reads no "
                "layer of that type in it. Export the model again."
            )
        gpu_name = builder.gpu.name if builder.gpu else None
        asked = asdict(options) | {"timing_cache": options.timing_cache and str(options.timing_cache)}
        report = EngineReport(
            str(path), backend, builder.version, {"name": graph.path.name, "sha256": sha256(graph.path)},
            graph.metadata, shapes, asked, warnings, builder.describe_tensors(), gpu_name, list(gpus),
            network_types=types,
        )  # fmt: skip
        if uses_plugin:
            library, op_version = builder.plugins, graph.metadata["op_version"]
            report.plugin = {"name": library.name, "sha256": sha256(library), "op_version": op_version}
            report.plugin_inside = options.version_compatible
        stage = "build the engine"
        progress(stage, 0, 1)
        plan = folder / path.name
        plan.write_bytes(builder.build(shapes, options, lambda done: progress(stage, done, 1)))
        report.size_bytes, report.sha256 = plan.stat().st_size, sha256(plan)
        record, table = record_path(plan), Path(f"{plan}.layers.json")
        record.write_text(json.dumps(report.to_dict()))
        layers = _examine(report, builder.trt, plan, graph.path, **checking)
        report.metadata = report.metadata | {"verification": _verification(report.verdict, graph.metadata, doubt)}
        report.seconds = round(time.monotonic() - start, 1)
        record.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        path.with_name(table.name).unlink(missing_ok=True)  # of an engine that was here before
        if layers is not None:
            table.write_text(json.dumps(layers, indent=2) + "\n")
        for file in filter(Path.exists, (record, plan, table)):
            os.replace(file, path.with_name(file.name))
    return report


def _verification(verdict: Verdict, metadata: dict, doubt: str) -> dict:
    """What the engine's metadata says of it: no more than is proven of the ONNX model that it was compared with."""
    if not doubt or verdict.status == FAILED:
        return verdict.summary()
    status = (metadata.get("verification") or {}).get("verdict")
    return verdict.summary() | {
        "verdict": status if status in (FAILED, CANNOT_TELL) else NOT_VERIFIED,
        "passed": False,
        "why": f"the ONNX model that it was built from {doubt}",
    }


class _Graph:
    """What of an ONNX file matters before it is parsed; raises LiteDetrError for one that `backend` cannot take."""

    def __init__(self, path: Path, backend: str):
        proto = artifact.load_onnx(path, weights=False)
        artifact.check_external_data(path, proto)
        self.path, self.metadata = path, artifact.onnx_metadata(proto, path)
        for key, allowed in (("precision", PRECISIONS), ("attention", ATTENTIONS)):
            if (value := self.metadata.get(key)) not in allowed:
                known = " or ".join(map(repr, allowed)) + ". Export the model again."
                raise LiteDetrError(f"the metadata of {path} gives {value!r} as {key}; it must be {known}")
        self.precision = self.metadata["precision"]
        if self.precision == "int8" and self.metadata.get("target") == "cpu":
            raise LiteDetrError(
                f"{path} was exported in INT8 for CPUs, in types that TensorRT does not quantize to. Export it again "
                "without `--target cpu`."
            )
        self.operators = frozenset(node.op_type for node in proto.graph.node)
        opsets = {opset.domain: opset.version for opset in proto.opset_import}
        check_op_version(path, self.metadata, opsets.get(schema.DOMAIN))
        if backend == "tensorrt-rtx" and self.metadata["attention"] == "op":
            raise LiteDetrError(
                f"{path} holds the fused attention ops, and TensorRT-RTX has no plugins to run them. Export the model "
                "with `litedetr export --attention gather`, or give its checkpoint to `litedetr build`, which exports "
                "the right graph itself."
            )
        opset = opsets.get("", opsets.get("ai.onnx", 0))
        if "GridSample" in self.operators and opset >= FIRST_MISREAD_OPSET:
            raise LiteDetrError(
                f"{path} holds GridSample nodes of opset {opset}: from opset {FIRST_MISREAD_OPSET} on, TensorRT's "
                "parser reads their 'linear' as nearest without a word (NVIDIA/TensorRT issue 4646). Export the model "
                "with --attention op or gather."
            )


def _export(model, onnx, variant, force_variant, image_size, **options):
    options["progress"]("load PyTorch and the checkpoint")
    try:
        from ..export.export import export_onnx
        from ..model.checkpoints import load_model
    except ImportError as error:
        raise (not_installed(error, f"{model} is no .onnx file, so it is exported first, which") or error) from error
    if isinstance(model, (str, os.PathLike)):
        model = load_model(os.fspath(model), variant, force_variant)
    sizes = {tuple(size) for size in image_size or [(800, 1333)]}
    report = export_onnx(model, onnx, image_size=sizes.pop() if len(sizes) == 1 else None, **options)
    if options["verify"] and not report.verdict.passed:
        fix = "Run `litedetr export` on the same weights to see all figures."
        raise CheckFailed(f"no engine was built: {report.verdict}. {fix}")


def _examine(report, trt, plan, onnx, verify, images, progress):
    """Inspect and verify the engine as far as this machine can; return the inspector's layers, None without a GPU."""
    try:
        gpu = cuda.find_gpu()
        if report.backend == "tensorrt-rtx" and gpu.compute_capability not in report.compute_capabilities:
            targets, here = ", ".join(report.compute_capabilities), f"{gpu.name} has {gpu.compute_capability}"
            raise LiteDetrError(f"the engine is for compute capability {targets}, and {here}")
    except LiteDetrError as error:
        report.not_inspected = report.verdict.skipped = str(error)
        return None
    progress("inspect the engine")
    layers = api.inspect(trt, gpu, plan, report.to_dict())
    report.layer_types = api.count_layer_types(layers)
    precision = report.metadata["precision"]
    if not verify:
        report.verdict.skipped = "it was not asked for"
    elif "fused_from" in report.metadata:
        report.verdict.skipped = (
            "its inputs and outputs are those of another exporter, of which detections are not known"
        )
    elif precision == "bf16":
        report.verdict.skipped = "ONNX Runtime's CPU does not compute in bfloat16"
    else:
        smallest, best, largest = report.shapes["images"]
        batch, sizes = (smallest[0], largest[0]), sorted({best[2:], largest[2:]})
        with contextlib.closing(TensorRTSession(plan)) as session:
            report.verdict = verify_engine(session, OnnxSession(onnx), precision, batch, sizes, images, progress)
    return layers
