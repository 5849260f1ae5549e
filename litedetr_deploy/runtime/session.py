"""Sessions: the one place that starts an inference engine, with the attention ops registered."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..artifact import ENGINE_SUFFIXES, METADATA_KEY, check_file, damaged, opset_version, parse_metadata
from ..errors import LiteDetrError, nearest, not_installed
from ..files import tomllib
from ..machine import bounded_threads, has_vnni
from ..ops import native, schema

# ONNX Runtime's CPU kernel of what this makes is several times slower than the LayerNormalization and sums that go in.
_CPU_SLOWED_BY = ("SkipLayerNormFusion",)


def create_session(
    onnx: str | os.PathLike | bytes, providers: Sequence | None = None, threads: int | None = None, options=None
):
    """Return an `onnxruntime.InferenceSession` on `onnx`, with the attention ops registered.

    onnx: path of the model, or the serialized model as bytes (which cannot refer to external weights).
    providers: execution providers as ONNX Runtime takes them, first choice first; the CPU when not given.
    threads: inside an operator, at most one a logical core; ONNX Runtime's choice, one a physical core, when not given.
    options: `onnxruntime.SessionOptions` to start from, for instance with profiling enabled.

    Raises LiteDetrError when ONNX Runtime or a provider is not installed, when the model is missing, is not ONNX or is
    damaged, when its attention ops are not those of this version, and when its metadata contradicts its graph.
    """
    name = "the given bytes" if isinstance(onnx, bytes) else os.fspath(onnx)
    if not isinstance(onnx, bytes):
        check_file(name, "an ONNX model, for instance one that `litedetr export` made")
    ort = import_onnxruntime()
    providers = _check_providers(ort, providers)
    options = options or ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = bounded_threads(threads)
    check_op_version(name, {}, opset_version(onnx, schema.DOMAIN))
    if not has_vnni():
        # Sums of two products of INT8 would saturate.  With VNNI they do not, and INT8 takes half as long without this.
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3  # its warnings are about its own optimisations
    no_library = None
    try:
        register_ops(options)
    except LiteDetrError as error:
        no_library = error  # which matters only to a model that holds our ops
    disabled = _CPU_SLOWED_BY if providers == ["CPUExecutionProvider"] else ()
    try:
        model = onnx if isinstance(onnx, bytes) else name
        session = ort.InferenceSession(model, options, providers=providers, disabled_optimizers=disabled)
    except Exception as error:  # ONNX Runtime's classes share no base, and their names are not public
        raise _explain(name, str(error), no_library) from error
    if (
        "CUDAExecutionProvider" in map(_provider_name, providers)
        and "CUDAExecutionProvider" not in session.get_providers()
    ):
        raise LiteDetrError(  # ONNX Runtime itself only warns and then runs on the CPU
            "ONNX Runtime cannot start CUDA here: a GPU, its driver, or the libraries of CUDA and cuDNN that it was "
            "built for are missing. `litedetr doctor` says what is there; the device 'cpu' needs none of them."
        )
    metadata = read_metadata(session)
    check_op_version(name, metadata)
    inputs, outputs = ({v.name: v.shape for v in values} for values in (session.get_inputs(), session.get_outputs()))
    check_metadata(name, metadata, inputs, outputs)
    return session


RUNTIMES = ("onnxruntime", "openvino")


def open_session(
    artifact: str | os.PathLike | bytes, providers: Sequence | None = None, threads: int | None = None,
    runtime: str | None = None, precision: str | None = None, throughput: bool = False, device: str | None = None,
):  # fmt: skip
    """Return the session that runs `artifact`: a TensorRT engine (.plan, .engine), else an ONNX model.

    providers, threads: of ONNX Runtime, as `create_session` takes them; OpenVINO has threads, an engine neither.
    runtime: what runs an ONNX model, of RUNTIMES; ONNX Runtime when not given.
    precision, throughput: of OpenVINO, as `OpenVinoSession` takes them.
    device: 'cpu', 'cuda' or 'cuda:1', instead of `providers`.  OpenVINO runs on the CPU, an engine on the first GPU.

    Raises LiteDetrError for options that the runtime does not have, and for what the session raises it.
    """
    is_engine = not isinstance(artifact, bytes) and Path(artifact).suffix.lower() in ENGINE_SUFFIXES
    if runtime not in (None, *RUNTIMES):
        known = " or ".join(map(repr, RUNTIMES)) + "." + nearest(runtime, RUNTIMES)
        raise LiteDetrError(f"runtime is {runtime!r}; an ONNX model runs in {known}")
    if is_engine and runtime is not None:
        raise LiteDetrError(f"runtime is {runtime!r}, and TensorRT runs the engine {artifact!r}. Leave it out.")
    if device is not None:
        if providers:
            raise LiteDetrError(f"device is {device!r}, and execution providers are given as well. Leave one out.")
        runner = "TensorRT" if is_engine else "OpenVINO" if runtime == "openvino" else "ONNX Runtime"
        providers = _check_device(device, runner)
    if runtime == "openvino":
        if providers:
            raise LiteDetrError("execution providers are ONNX Runtime's: OpenVINO runs on the CPU. Leave them out.")
        from .openvino import OpenVinoSession

        return OpenVinoSession(artifact, threads, precision, throughput)
    if precision is not None:
        fix = "Choose the runtime 'openvino', or export the model in that precision."
        raise LiteDetrError(f"precision is {precision!r}, which OpenVINO alone can choose when it loads a model. {fix}")
    if is_engine:
        from .tensorrt import TensorRTSession

        return TensorRTSession(artifact)
    return OnnxSession(artifact, providers, threads)


def _check_device(device: str, runner: str) -> list | None:
    """Return the execution providers for a device, None where `runner` has none; raise LiteDetrError where it cannot
    run there."""
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", device, re.ASCII)
    if not match:
        raise LiteDetrError(f"device is {device!r}; it must be 'cpu', 'cuda', or a GPU by its number, as in 'cuda:1'.")
    number = int(match[1] or 0)
    if runner == "TensorRT" and (device == "cpu" or number):
        fix = "Leave it out; to choose another GPU, set CUDA_VISIBLE_DEVICES to its number."
        raise LiteDetrError(f"device is {device!r}, and an engine runs on the GPU that CUDA numbers 0. {fix}")
    if runner == "OpenVINO" and device != "cpu":
        raise LiteDetrError(f"device is {device!r}, and OpenVINO runs on the CPU here. Leave it out.")
    if runner != "ONNX Runtime":
        return None
    if device == "cpu":
        return ["CPUExecutionProvider"]
    available = import_onnxruntime().get_available_providers()
    if "CUDAExecutionProvider" not in available:
        raise LiteDetrError(
            f"device is {device!r}, and the ONNX Runtime here has no CUDA; it has {', '.join(available)}. Install "
            "onnxruntime-gpu in place of onnxruntime, or choose the device 'cpu'."
        )
    return [("CUDAExecutionProvider", {"device_id": number}), "CPUExecutionProvider"]


def import_onnxruntime():
    """Return the `onnxruntime` module; raise LiteDetrError when it cannot be imported."""
    try:
        import onnxruntime
    except ImportError as error:
        raise (not_installed(error, "Running an ONNX model") or error) from error
    return onnxruntime


def register_ops(options):
    """Register the compiled attention ops with `onnxruntime.SessionOptions`; raise LiteDetrError when that fails."""
    try:
        library = native.library("onnxruntime")
    except FileNotFoundError as error:
        raise LiteDetrError(str(error)) from error
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        runtime = f"ONNX Runtime {import_onnxruntime().__version__}"
        fix = "Build it again on this machine, or install a newer onnxruntime."
        raise LiteDetrError(f"{runtime} cannot use the op library {library}: {error}. {fix}") from error


def read_metadata(session) -> dict:
    """Return what `litedetr export` wrote into the model as a dict; empty for a model that something else made."""
    return parse_metadata(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "{}"), "the model")


class OnnxSession:
    """An ONNX artifact, ready to run.  `Detector` uses no more of an engine than this.

    inputs: name -> shape, a tuple with an int where the size is fixed and something else where it is dynamic
    outputs: names, in the model's order
    metadata: what `litedetr export` wrote into the model
    """

    def __init__(self, artifact, providers=None, threads=None):
        self._session = create_session(artifact, providers, threads)
        self.inputs = {value.name: tuple(value.shape) for value in self._session.get_inputs()}
        self.outputs = tuple(value.name for value in self._session.get_outputs())
        self.metadata = read_metadata(self._session)

    def run(self, feed: dict) -> dict:
        """Run on a dict of name -> array; return a dict of name -> array.  A batch of 0 gives empty arrays."""
        if 0 in map(len, feed.values()):
            return {value.name: _empty(value) for value in self._session.get_outputs()}
        return dict(zip(self.outputs, self._session.run(self.outputs, feed)))


def _empty(value) -> np.ndarray:
    """An output of ONNX Runtime for a batch of 0; a size that the model leaves open is 0 as well."""
    kinds = {"tensor(int64)": np.int64, "tensor(double)": np.float64, "tensor(float16)": np.float16}
    sizes = [size if isinstance(size, int) else 0 for size in value.shape[1:]]
    return np.empty((0, *sizes), kinds.get(value.type, np.float32))


def _check_providers(ort, providers):
    providers = list(providers or ["CPUExecutionProvider"])
    available = ort.get_available_providers()
    for provider in map(_provider_name, providers):
        if provider not in available:  # ONNX Runtime itself only warns and then runs on the CPU
            raise LiteDetrError(
                f"ONNX Runtime has no execution provider {provider!r} here; it has {', '.join(available)}. Choose one "
                "of these, or install the onnxruntime package that brings the one you want."
            )
    return providers


def _provider_name(provider) -> str:
    return provider if isinstance(provider, str) else provider[0]


def read_data(name: str) -> dict:
    """Return the content of a TOML file in this folder."""
    return tomllib.loads(Path(__file__).with_name(name).read_text())


def find_failure(runtime: str, said: str) -> tuple[dict, str | None]:
    """Return what failures.toml has on 'onnxruntime' or 'tensorrt', and the name of the row that `said` fits."""
    rows = read_data("failures.toml")[runtime]
    return rows, next((why for why, row in rows.items() if re.search(row["said"], said, re.IGNORECASE)), None)


def _explain(name: str, said: str, no_library: LiteDetrError | None) -> LiteDetrError:
    """Return the error for ONNX Runtime's failure to load `name`."""
    rows, why = find_failure("onnxruntime", said)
    if why == "damaged":
        return damaged(name, "ONNX Runtime cannot parse it")
    if why == "op" and no_library is not None:
        return LiteDetrError(
            f"{name} holds the fused attention ops, and their library is not usable. {no_library} A model exported "
            "with `--attention gather` runs without it."
        )
    detail = said.rpartition("Error: ")[2].strip().rstrip(".")  # without the file that raised it
    return LiteDetrError(rows[why]["message"].format(name=name, said=said, detail=detail, version=schema.VERSION))


_OUTPUTS = {"detections": {"labels", "boxes", "scores"}, "raw": {"pred_logits", "pred_boxes"}}


def check_metadata(name: object, metadata: dict, inputs: Mapping, outputs: Mapping | Collection, fixed=True) -> None:
    """Raise LiteDetrError where the metadata of the model `name` contradicts its graph.

    inputs, outputs: name -> shape; an int where a size is fixed.
    fixed: sizes that the metadata leaves open must be open, as they need not be in an engine.
    """

    def refuse(what, said, found):
        raise LiteDetrError(
            f"the metadata of {name} contradicts its graph: its {what} {said}, and the graph has {found}. Something "
            "changed one of them after the export: export the model again."
        )

    kind = metadata.get("outputs")
    if isinstance(kind, str) and kind in _OUTPUTS and not _OUTPUTS[kind] <= set(outputs):
        refuse("outputs are", f"{kind!r}, {', '.join(sorted(_OUTPUTS[kind]))}", ", ".join(sorted(outputs)))
    if "pixel_mask" in metadata and bool(metadata["pixel_mask"]) != ("pixel_mask" in inputs):
        refuse("pixel_mask is", metadata["pixel_mask"], "no such input" if metadata["pixel_mask"] else "that input")
    if "image_size" in metadata and "images" in inputs:
        sides = [side if isinstance(side, int) else None for side in inputs["images"][2:]]
        wanted = metadata["image_size"] or ([None, None] if fixed else sides)
        if wanted != sides:
            found = "x".join("any" if side is None else str(side) for side in sides)
            refuse("image_size is", metadata["image_size"] or "dynamic", f"images of {found}")
    names = metadata.get("class_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(one, str) for one in names)):
        fix = "they must be a list of texts. Export the model again."
        raise LiteDetrError(f"the class names in the metadata of {name} are {str(names)[:80]!r}; {fix}")
    classes = (outputs.get("pred_logits") or [None])[-1] if isinstance(outputs, Mapping) else None
    if names and isinstance(classes, int) and classes != len(names):
        refuse("class_names are", len(names), f"{classes} classes")


def check_op_version(name: object, metadata: dict, opset: int | None = None) -> None:
    """Raise LiteDetrError where the attention ops in `name` are of another version than this package's, by its metadata
    or by the `opset` that it imports."""
    if opset not in (None, schema.VERSION):
        raise LiteDetrError(
            f"{name} imports version {opset} of the opset {schema.DOMAIN!r}; this package has version {schema.VERSION} "
            "of the attention ops. Export the model again, or install the litedetr-deploy that made it."
        )
    version = metadata.get("op_version", schema.VERSION)
    if metadata.get("attention") == "op" and version != schema.VERSION:
        raise LiteDetrError(
            f"{name} was exported with version {version} of the attention ops; this package has version "
            f"{schema.VERSION}. Export the model again, or install litedetr-deploy "
            f"{metadata.get('tool_version', 'of that time')}."
        )
