"""What is to be measured, the files that it needs, and what of it this machine cannot run and why.

Imports neither PyTorch nor an engine.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .. import __version__, assets
from ..artifact import ENGINE_SUFFIXES, SUFFIXES, check_file, sha256, warn_unless_verified
from ..assets.shapes import scene
from ..errors import LiteDetrError
from ..export import limits
from ..machine import computes_bfloat16
from ..model.config import parse_variant
from ..ops import native
from ..runtime.tensorrt import read_record
from ..verify.reference import Reference, Weights, make_image, make_reference
from .packages import is_installed, missing_packages
from .report import table
from .sensors import find_sensors
from .timing import check_threads, memory_bytes

_sha256 = functools.cache(sha256)
PRECISIONS = limits.PRECISIONS
DEVICES = ("cpu", "cuda")
CALIBRATION_SEED, CALIBRATION_SCENES = 5, 4
BYTES_PER_PIXEL = 128  # that any backbone's first layers hold at once, at the least
ENGINES = {  # the package, the library of our ops that it loads, and the precisions that it runs
    "onnxruntime": ("onnxruntime", "onnxruntime", PRECISIONS),
    "openvino": ("openvino", "openvino", ("fp32", "int8")),
    "pytorch": ("torch", "core", ("fp32", "fp16", "bf16")),
    "tensorrt": ("tensorrt", "tensorrt", PRECISIONS),
}


@dataclass(frozen=True)
class Backend:
    """One way to run a detector."""

    engine: str  # of ENGINES
    attention: str  # of the exported graph; of PyTorch 'op' or 'official'
    about: str
    devices: tuple[str, ...] = DEVICES
    mode: str = ""  # of PyTorch: 'compile' or 'graph'; of OpenVINO: 'bf16', which it computes FP32 in


BACKENDS = {
    "onnxruntime-op": Backend("onnxruntime", "op", "ONNX Runtime, our fused attention op"),
    "onnxruntime-gather": Backend("onnxruntime", "gather", "ONNX Runtime, attention in standard ops (Gather)"),
    "onnxruntime-gridsample": Backend("onnxruntime", "gridsample", "ONNX Runtime, attention by GridSample"),
    "openvino-op": Backend("openvino", "op", "OpenVINO, our fused attention op", ("cpu",)),
    "openvino-op-bf16": Backend("openvino", "op", "OpenVINO, our op, FP32 computed in BF16", ("cpu",), "bf16"),
    "openvino-gather": Backend("openvino", "gather", "OpenVINO, attention in standard ops", ("cpu",)),
    "openvino-gridsample": Backend("openvino", "gridsample", "OpenVINO, attention by GridSample", ("cpu",)),
    "openvino-gridsample-bf16": Backend(
        "openvino", "gridsample", "OpenVINO, attention by GridSample, FP32 computed in BF16", ("cpu",), "bf16"
    ),
    "pytorch": Backend("pytorch", "op", "PyTorch, our op"),
    "pytorch-official": Backend("pytorch", "official", "PyTorch, the arithmetic of the official code"),
    "pytorch-compile": Backend("pytorch", "op", "torch.compile, our op", mode="compile"),
    "pytorch-graph": Backend("pytorch", "op", "PyTorch, our op, as one CUDA graph", ("cuda",), "graph"),
    "tensorrt-op": Backend("tensorrt", "op", "TensorRT engine, our plugin", ("cuda",)),
    "tensorrt-gather": Backend("tensorrt", "gather", "TensorRT engine, standard ops", ("cuda",)),
}
DEFAULT_BACKENDS = ("onnxruntime-op", "onnxruntime-gridsample", "pytorch", "pytorch-official")


@dataclass(frozen=True)
class Spec:
    """One thing to measure."""

    model: str  # a variant, a checkpoint, or the path of an artifact
    backend: str  # of BACKENDS
    precision: str
    batch: int
    image_size: tuple[int, int]
    device: str
    threads: int  # of the CPU

    @property
    def way(self) -> Backend:
        return BACKENDS[self.backend]

    @property
    def rounding(self) -> str:
        """What it computes in, of PRECISIONS: its tolerances."""
        return "bf16" if self.way.mode == "bf16" and self.precision == "fp32" else self.precision

    @property
    def target(self) -> str:
        """What it is exported for, as `export_onnx` takes it."""
        return "cpu" if self.device == "cpu" and self.precision == "int8" else "gpu"

    @property
    def is_artifact(self) -> bool:
        return Path(self.model).suffix.lower() in SUFFIXES

    @property
    def group(self) -> tuple:
        """Specs with the same are compared with each other."""
        return self.image_size, self.batch, self.device, self.threads

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.image_size[0]}x{self.image_size[1]}"

    @property
    def where(self) -> str:
        """What the specs of a group have in common."""
        device = "CUDA" if self.device == "cuda" else f"CPU, {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.image_size[0]}x{self.image_size[1]}, batch {self.batch}, {device}"

    @property
    def name(self) -> str:
        """Model, backend and precision: what tells it from the others of its group."""
        model = Path(self.model).name if self.is_artifact else self.model
        return f"{model}, {self.backend}" + ("" if self.precision == "fp32" else f", {self.precision}")


def make_plan(
    models: Sequence[str], backends: Sequence[str], precisions: Sequence[str], batches: Sequence[int],
    image_sizes: Sequence[tuple[int, int]], device: str, threads: Sequence[int],
) -> list[Spec]:  # fmt: skip
    """Return all combinations, those that are compared with each other side by side.

    An artifact has its own attention, precision and, where it is fixed, size; ONNX Runtime runs an .onnx, OpenVINO as
    well where it is among `backends`.  Gives a `Notice` for an artifact that was not verified; raises LiteDetrError
    for what does not exist, and for more threads or memory than this machine has.
    """
    options = ("backend", backends, BACKENDS), ("precision", precisions, PRECISIONS), ("device", [device], DEVICES)
    for option, values, known in options:
        if unknown := [value for value in values if value not in known]:
            raise LiteDetrError(f"The {option} {unknown[0]!r} does not exist. Choose from {', '.join(known)}.")
    check_threads(threads)
    for batch, (height, width) in itertools.product(batches, image_sizes):
        limits.check_size(height, width)
        if (needed := batch * height * width * BYTES_PER_PIXEL) > memory_bytes():
            raise LiteDetrError(
                f"Batches of {batch} images of {height}x{width} need more than {needed >> 30} GiB, and this machine "
                f"has {memory_bytes() >> 30}. Choose a smaller batch or image size."
            )
    for model in dict.fromkeys(models):
        if Path(model).suffix.lower() in SUFFIXES:
            check_file(model, "an artifact; `litedetr export` makes one")
            warn_unless_verified(model, artifact_metadata(Path(model)))
        elif model not in assets.NAMES and not Path(model).is_file():
            try:
                parse_variant(model)
            except LiteDetrError as error:
                what = f"{model!r} is neither a file that exists nor the name of a detector"
                raise LiteDetrError(f"{what}: {error}") from error
    if device == "cuda":
        threads = threads[:1]  # of the host: they do not matter
    specs = []
    for choice in itertools.product(image_sizes, batches, threads, models, precisions, backends):
        size, batch, count, model, precision, backend = choice
        spec = Spec(model, backend, precision, batch, size, device, count)
        specs += _of_artifact(spec, backends) if spec.is_artifact else [spec]
    return list(dict.fromkeys(specs))  # an artifact came once for every backend, precision and, where fixed, size


def _of_artifact(spec: Spec, backends: Sequence[str]) -> list[Spec]:
    metadata, device = artifact_metadata(Path(spec.model)), spec.device
    # What others made of deformable attention has GridSample.
    attention = metadata.get("attention", "op" if metadata else "gridsample")
    precision = metadata.get("precision", "fp32")
    size = tuple(metadata.get("image_size") or spec.image_size)
    also = [name for name in backends if BACKENDS[name].engine == "openvino" and BACKENDS[name].attention == attention]
    names = [f"onnxruntime-{attention}", *also]
    if Path(spec.model).suffix.lower() in ENGINE_SUFFIXES:
        names, device = ["tensorrt-gather" if attention == "gather" else "tensorrt-op"], "cuda"
    return [replace(spec, backend=name, precision=precision, image_size=size, device=device) for name in names]


@functools.cache
def artifact_metadata(path: Path) -> dict:
    """Return what `litedetr export` wrote about a model; empty for an artifact that something else made."""
    if path.suffix.lower() in ENGINE_SUFFIXES:
        return read_record(path).get("metadata", {})
    from ..runtime.session import OnnxSession

    return OnnxSession(path).metadata


class Cache:
    """Exported models and PyTorch's outputs in a folder, which serves on a machine without PyTorch as well.

    checkpoint: the weights that artifacts were made from, as `Weights.source`; variant: of a checkpoint that cannot
    tell; build: makes an engine of a graph, given both paths and the batch.
    """

    def __init__(
        self, folder: Path, checkpoint: str | None = None, variant: str | None = None,
        build: Callable[[Path, Path, int], object] | None = None,
    ):  # fmt: skip
        self.folder, self.checkpoint, self.chosen_variant, self._build = folder, checkpoint, variant, build
        self.progress: Callable[[str], None] = lambda stage: None  # called with what is made
        self._weights: dict[str, Weights] = {}
        self._references: dict[Path, Reference] = {}

    def graph(self, spec: Spec) -> Path:
        """Return the path of the ONNX model; an artifact is its own."""
        made = f"{spec.way.attention}-{spec.precision}{'-cpu' if spec.target == 'cpu' else ''}.onnx"
        return Path(spec.model) if spec.is_artifact else self.folder / f"{_stem(spec.model, spec.image_size)}-{made}"

    def model_path(self, spec: Spec) -> Path:
        graph, is_built = self.graph(spec), spec.way.engine == "tensorrt" and not spec.is_artifact
        return graph.with_name(f"{graph.stem}-batch{spec.batch}.plan") if is_built else graph  # best for this batch

    def reference_path(self, spec: Spec) -> Path:
        """Return the path of PyTorch's outputs; of an artifact of unknown weights, of its image alone."""
        return self.folder / f"{_stem(self.weights_name(spec) or 'image', spec.image_size)}.npz"

    def weights_name(self, spec: Spec) -> str | None:
        """Return what `Weights` takes; None for an artifact of unknown weights."""
        return self.checkpoint if spec.is_artifact else spec.model

    def prepare(self, specs: Iterable[Spec]) -> list[Path]:
        """Make everything that measuring needs but engines; return the files."""
        files = []
        for spec in specs:
            if spec.precision not in ENGINES[spec.way.engine][2]:
                continue
            files += [self.reference(spec).path, *([] if spec.way.engine == "pytorch" else [self._export(spec)])]
        return list(dict.fromkeys(files))

    def engine(self, spec: Spec) -> tuple:
        """Return the arguments of `open_engine`, in another process too: of the weights the name, not the tensors."""
        weights = replace(self.weights(spec)) if spec.way.engine == "pytorch" else None
        return spec, self.model(spec), self.reference(spec).path, weights

    def variant(self, spec: Spec) -> str | None:
        """Return the name of the detector; None for a checkpoint, and where an artifact does not tell."""
        with contextlib.suppress(LiteDetrError):
            if spec.is_artifact:
                return artifact_metadata(Path(spec.model)).get("variant")
            if self.weights(spec).random:
                return parse_variant(spec.model).name
        return None

    def weights(self, spec: Spec) -> Weights | None:
        source = self.weights_name(spec)
        if source is not None and source not in self._weights:
            known = self.variant(spec) if spec.is_artifact else None
            self._weights[source] = Weights(source, self.chosen_variant or known)
        return self._weights.get(source)

    def reference(self, spec: Spec) -> Reference:
        """Return PyTorch's outputs, with the tolerances of the spec's precision, made where they are not there yet."""
        path, weights = self.reference_path(spec), self.weights(spec)
        reference = self._references.get(path)
        if reference is None and path.is_file():
            reference = Reference(path, weights if is_installed("torch") else None)
        missing = {"fp32", spec.rounding}.difference(reference.precisions if reference else ())
        if missing:
            path.parent.mkdir(parents=True, exist_ok=True)
            if weights is None:
                return make_image(path, spec.image_size)
            self.progress(f"{spec.model}: PyTorch's outputs at {spec.image_size[0]}x{spec.image_size[1]}")
            graph = self._quantized(spec) if "int8" in missing else None
            reference = make_reference(path, weights, spec.image_size, sorted(missing), reference, graph)
        self._references[path] = reference
        return reference

    def _quantized(self, spec: Spec) -> Path | None:
        """Return the ONNX model in INT8, exported where it is not there yet; None for an engine."""
        if not spec.is_artifact:
            return self._export(spec)
        return Path(spec.model) if Path(spec.model).suffix == ".onnx" else None

    def model(self, spec: Spec) -> Path:
        """Return the artifact; exported, and built, where it is not there yet.  PyTorch reads none."""
        path = self.model_path(spec)
        if spec.way.engine != "pytorch" and not path.is_file():
            graph = self._export(spec)
            if path != graph and self._build:
                self.progress(f"{spec.model}: build the engine")
                self._build(graph, path, spec.batch)
        return path

    def _export(self, spec: Spec) -> Path:
        path = self.graph(spec)
        if not path.is_file():
            from ..export.export import export_onnx

            path.parent.mkdir(parents=True, exist_ok=True)
            self.progress(f"{spec.model}: export, attention {spec.way.attention}, {spec.precision}")
            int8 = None
            if spec.precision == "int8":  # of photographs or not, the time is the same
                int8 = limits.Int8([scene(i, CALIBRATION_SEED, spec.image_size)[0] for i in range(CALIBRATION_SCENES)])
            # Not verified here: what is timed is checked before, in the engine that is timed.
            export_onnx(self.weights(spec).model, path, spec.way.attention, spec.precision, spec.image_size,
                        outputs="raw", int8=int8, verify=False, target=spec.target)  # fmt: skip
        return path


def _stem(weights: str, image_size: tuple[int, int]) -> str:
    path = Path(weights)
    digest = _sha256(path)[:10] if path.is_file() else "random"
    name = re.sub(r"[^\w+.-]", "_", path.stem if path.is_file() else weights)
    return f"{name}-{digest}-{image_size[0]}x{image_size[1]}-{sources_digest()}"


@functools.cache
def sources_digest() -> str:
    """Return a digest of the code that makes a model what it is: what other code exported is not measured."""
    folders = [Path(__file__).parents[1] / part for part in ("model", "ops", "export")]
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return hashlib.sha256(__version__.encode() + b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


def why_missing(spec: Spec, cache: Cache, unchecked: bool = False) -> str:
    """Return why this machine cannot measure something, or check it unless `unchecked`; empty where it can."""
    way = spec.way
    package, library, precisions = ENGINES[way.engine]
    if way.engine == "tensorrt" and spec.is_artifact and read_record(spec.model).get("backend") == "tensorrt-rtx":
        package = "tensorrt_rtx"
    packages, reasons = [package], []
    if spec.device not in way.devices:
        reasons.append(f"it runs on {' and '.join(way.devices)} only, not on {spec.device}")
    elif spec.device == "cuda":
        reasons.append(_why_no_cuda(way.engine))
    if way.engine != "pytorch" and not cache.graph(spec).is_file():
        packages += ["torch", "onnx", "onnxscript"]  # to export it
    if cache.weights_name(spec) is None:
        text = "its weights are not known, so that it cannot be checked: give --checkpoint, or --unchecked"
        reasons.append("" if unchecked else text)
    elif not cache.reference_path(spec).is_file():
        packages.append("torch")  # to check it
    reasons.append(missing_packages(packages))
    if way.engine == "openvino" and way.mode == "bf16" and not computes_bfloat16():
        reasons.append("this processor does not compute in bfloat16")
    try:
        if way.attention == "op" and library:
            native.library(library)
    except FileNotFoundError:
        text = f"the {library} library of our ops is not built: pip install --force-reinstall . in the source folder"
        reasons.append(text)
    if spec.precision not in precisions:
        reasons.append(f"{spec.precision} is not supported by {way.engine} here, {' and '.join(precisions)} only")
    return "; ".join(filter(None, reasons))


def _why_no_cuda(engine: str) -> str:
    if engine == "onnxruntime" and is_installed("onnxruntime"):
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "this onnxruntime has no CUDA provider: pip install onnxruntime-gpu, in place of onnxruntime"
    if engine == "pytorch" and is_installed("torch"):
        import torch

        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA device here"
    if engine == "tensorrt" and not any(Path("/dev", name).exists() for name in ("nvidiactl", "nvhost-ctrl-gpu")):
        return "there is no NVIDIA GPU here"
    return ""


def describe_plan(specs: Sequence[Spec], cache: Cache, unchecked: bool) -> tuple[list[dict], list[str]]:
    """Return for each spec, as JSON types, what it is and its state: 'ready', 'to be exported' or 'missing' and why;
    and lines of the same for people, with what would add to a report and is not here."""
    rows, cells = [], []
    for spec in specs:
        reason = why_missing(spec, cache, unchecked)
        made = spec.way.engine == "pytorch" or cache.model_path(spec).is_file()
        state = "missing" if reason else "ready" if made else "to be exported"
        rows.append(asdict(spec) | {"contender": spec.name, "state": state, "trouble": reason})
        cells.append([spec.name, spec.shape, spec.device, str(spec.threads), state + (reason and f": {reason}")])
    lines = table(("contender", "size", "device", "threads", "state"), cells)
    ready = sum(row["state"] != "missing" for row in rows)
    lines += ["", f"{ready} of {len(rows)} can be measured here; exported models are kept in {cache.folder}"]
    extras = {
        "matplotlib (the chart: pip install matplotlib)": is_installed("matplotlib"),
        "onnx (times by part in ONNX Runtime: pip install onnx)": is_installed("onnx"),
        "power sensors (NVML, by pip install nvidia-ml-py, or a Jetson's hwmon)": find_sensors(),
        "trtexec (its own figure beside ours, for engines)": shutil.which("trtexec"),
    }
    absent = "; ".join(extra for extra, found in extras.items() if not found)
    return rows, lines + [f"not here, and not needed: {absent}"] * bool(absent)
