"""What is to be measured, and what of it this machine cannot run and why.  Imports neither PyTorch nor an engine."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import __version__, assets
from ..errors import LiteDetrError
from ..export import limits
from ..model.config import parse_variant
from ..ops import native
from ..runtime.tensorrt import read_record
from .sensors import find_sensors

ENGINE_SUFFIXES = (".plan", ".engine")
ARTIFACT_SUFFIXES = (".onnx", *ENGINE_SUFFIXES)
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
TORCH_PRECISIONS = ("fp32", "fp16", "bf16")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Backend:
    """One way to run a detector."""

    engine: str  # 'onnxruntime', 'openvino', 'pytorch' or 'tensorrt'
    attention: str  # of the exported graph; of PyTorch 'op' or 'official'
    mode: str = ""  # of PyTorch: 'compile' or 'graph'
    devices: tuple[str, ...] = DEVICES
    about: str = ""


BACKENDS = {
    "onnxruntime-op": Backend("onnxruntime", "op", about="ONNX Runtime, our fused attention op"),
    "onnxruntime-gather": Backend("onnxruntime", "gather", about="ONNX Runtime, attention in standard ops (Gather)"),
    "onnxruntime-gridsample": Backend("onnxruntime", "gridsample", about="ONNX Runtime, attention by GridSample"),
    "openvino-gather": Backend("openvino", "gather", devices=("cpu",), about="OpenVINO, attention in standard ops"),
    "openvino-gridsample": Backend("openvino", "gridsample", devices=("cpu",), about="OpenVINO, by GridSample"),
    "pytorch": Backend("pytorch", "op", about="PyTorch, our op"),
    "pytorch-official": Backend("pytorch", "official", about="PyTorch, the arithmetic of the official code"),
    "pytorch-compile": Backend("pytorch", "op", "compile", about="torch.compile, our op"),
    "pytorch-graph": Backend("pytorch", "op", "graph", ("cuda",), "PyTorch, our op, as one CUDA graph"),
    "tensorrt-op": Backend("tensorrt", "op", devices=("cuda",), about="TensorRT engine, our plugin"),
    "tensorrt-gather": Backend("tensorrt", "gather", devices=("cuda",), about="TensorRT engine, standard ops"),
}
DEFAULT_BACKENDS = ("onnxruntime-op", "onnxruntime-gridsample", "pytorch", "pytorch-official")
INSTALL = {
    "onnxruntime": "pip install litedetr-deploy[onnxruntime]",
    "openvino": "pip install litedetr-deploy[benchmark]",
    "torch": "pip install litedetr-deploy[export]",
    "onnx": "pip install litedetr-deploy[export]",
    "onnxscript": "pip install litedetr-deploy[export]",
    "tensorrt": "pip install litedetr-deploy[tensorrt]",
    "tensorrt_rtx": "pip install litedetr-deploy[tensorrt-rtx]",
}


@dataclass(frozen=True)
class Row:
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
    def is_artifact(self) -> bool:
        return Path(self.model).suffix.lower() in ARTIFACT_SUFFIXES

    @property
    def group(self) -> tuple:
        """Rows with the same are compared with each other."""
        return self.image_size, self.batch, self.device, self.threads

    @property
    def key(self) -> str:
        height, width = self.image_size
        size = f"{self.batch}x{height}x{width}"
        return " | ".join((self.model, self.backend, self.precision, size, self.device, str(self.threads)))

    @property
    def contender(self) -> str:
        """Model, backend and precision: what tells it from the others of its group."""
        model = Path(self.model).name if self.is_artifact else self.model
        return f"{model}, {self.backend}" + ("" if self.precision == "fp32" else f", {self.precision}")

    def to_dict(self) -> dict:
        return {
            "model": self.model, "backend": self.backend, "precision": self.precision, "batch": self.batch,
            "image_size": list(self.image_size), "device": self.device, "threads": self.threads,
        }  # fmt: skip


def make_plan(
    models: Sequence[str],
    backends: Sequence[str],
    precisions: Sequence[str],
    batches: Sequence[int],
    image_sizes: Sequence[tuple[int, int]],
    device: str,
    threads: Sequence[int],
) -> list[Row]:
    """All rows, those that are compared with each other side by side.

    An artifact has its own attention, precision and, where it is fixed, size; ONNX Runtime runs an .onnx, OpenVINO as
    well where it is among `backends`.  Raises LiteDetrError for a wish that does not exist.
    """
    for name, values, known in (
        ("backend", backends, tuple(BACKENDS)),
        ("precision", precisions, PRECISIONS),
        ("device", [device], DEVICES),
    ):
        for value in values:
            if value not in known:
                raise LiteDetrError(f"The {name} {value!r} does not exist. Choose from {', '.join(known)}.")
    for name, values in (("batch size", batches), ("number of threads", threads)):
        if any(value < 1 for value in values):
            raise LiteDetrError(f"A {name} is {min(values)}; it must be 1 or more.")
    if device == "cuda":
        threads = threads[:1]  # of the host: they do not matter
    rows = []
    for size, batch, count, model in itertools.product(image_sizes, batches, threads, models):
        if Path(model).suffix.lower() in ARTIFACT_SUFFIXES:
            rows += _artifact_rows(model, backends, batch, size, device, count)
            continue
        limits.check("op", "fp32", size, "raw", limits.FIRST_OPSET)
        _check_name(model)
        for precision, backend in itertools.product(precisions, backends):
            rows.append(Row(model, backend, precision, batch, size, device, count))
    return list(dict.fromkeys(rows))  # an artifact of fixed size came once for every size


def _artifact_rows(model, backends, batch, size, device, threads):
    path = Path(model)
    if not path.is_file():
        raise LiteDetrError(f"The artifact {model} does not exist. Check the path; `litedetr export` makes one.")
    metadata = artifact_metadata(path)
    attention, precision = metadata.get("attention", "op"), metadata.get("precision", "fp32")
    size = tuple(metadata.get("image_size") or size)
    if path.suffix.lower() in ENGINE_SUFFIXES:
        names = ["tensorrt-gather" if attention == "gather" else "tensorrt-op"]
        device = "cuda"
    else:
        names = [f"onnxruntime-{attention}", *({f"openvino-{attention}"} & set(backends))]
    return [Row(model, name, precision, batch, size, device, threads) for name in names]


@functools.cache
def artifact_metadata(path: Path) -> dict:
    """What `litedetr export` wrote about the model; empty for an artifact that something else made."""
    if path.suffix.lower() in ENGINE_SUFFIXES:
        return read_record(path).get("metadata", {})
    from ..runtime.session import OnnxSession

    return OnnxSession(path).metadata


def _check_name(model: str) -> None:
    if model in assets.NAMES or Path(model).is_file():
        return
    try:
        parse_variant(model)
    except LiteDetrError as error:
        raise LiteDetrError(f"{model!r} is no file that exists, nor the name of a detector: {error}") from error


class Cache:
    """The folder of exported models and of PyTorch's outputs.  Copied to a machine without PyTorch it serves there.

    checkpoint: the weights that artifacts were made from, as `Weights.source`.
    """

    def __init__(self, folder: Path, checkpoint: str | None = None):
        self.folder, self.checkpoint = folder, checkpoint

    def model(self, row: Row) -> Path:
        """Where the artifact of a row is, or is to be."""
        if row.is_artifact:
            return Path(row.model)
        graph = self.graph(row)
        if row.is_artifact or row.way.engine != "tensorrt":
            return graph
        return graph.with_name(f"{graph.stem}-batch{row.batch}.plan")  # best for this batch

    def graph(self, row: Row) -> Path:
        """Where the ONNX model of a row is, or is to be; an artifact is its own."""
        if row.is_artifact:
            return Path(row.model)
        return self.folder / f"{_stem(row.model, row.image_size)}-{row.way.attention}-{row.precision}.onnx"

    def weights(self, row: Row) -> str | None:
        """What `Weights` takes; None for an artifact of unknown weights."""
        return self.checkpoint if row.is_artifact else row.model

    def reference(self, row: Row) -> Path:
        """Where PyTorch's outputs are, or are to be; of an artifact of unknown weights, its picture."""
        return self.folder / f"{_stem(self.weights(row) or 'picture', row.image_size)}.npz"


def _stem(weights: str, image_size: tuple[int, int]) -> str:
    path = Path(weights)
    digest = file_digest(path) if path.is_file() else "random"
    name = re.sub(r"[^\w+.-]", "_", path.stem if path.is_file() else weights)
    return f"{name}-{digest}-{image_size[0]}x{image_size[1]}-{sources_digest()}"


@functools.cache
def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()[:10]


@functools.cache
def sources_digest() -> str:
    """Of the code that makes a model what it is: what other code exported is not measured."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256(__version__.encode())
    for file in sorted(path for part in ("model", "ops", "export") for path in (package / part).glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def why_missing(row: Row, cache: Cache, unchecked: bool = False) -> str:
    """Why this machine cannot measure a row; empty where it can.

    unchecked: whether an artifact may be timed without a check.
    """
    way = row.way
    exists = cache.graph(row).is_file()
    reasons = [
        _wrong_device(row),
        _missing_packages([_package(row)]),
        _missing_provider(row),
        _missing_library(way),
        _missing_precision(row, exists),
    ]
    if way.engine != "pytorch" and not exists:
        reasons.append(_missing_packages(["torch", "onnx", "onnxscript"], "to export it"))
    if cache.weights(row) is None:
        if not unchecked:
            reasons.append("its weights are not known, so that it cannot be checked: give --checkpoint, or --unchecked")
    elif not cache.reference(row).is_file():
        reasons.append(_missing_packages(["torch"], "to check it"))
    return "; ".join(dict.fromkeys(filter(None, reasons)))


def _wrong_device(row: Row) -> str:
    devices = row.way.devices
    return "" if row.device in devices else f"it runs on {' and '.join(devices)} only, not on {row.device}"


def _package(row: Row) -> str:
    if row.way.engine == "tensorrt" and row.is_artifact and read_record(row.model).get("backend") == "tensorrt-rtx":
        return "tensorrt_rtx"
    return {"pytorch": "torch"}.get(row.way.engine, row.way.engine)


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # any folder of that name has a spec, but no origin


def _missing_packages(packages: Sequence[str], purpose: str = "") -> str:
    missing = [package for package in packages if not _is_installed(package)]
    if not missing:
        return ""
    remedies = " and ".join(dict.fromkeys(INSTALL[package] for package in missing))
    verb = "are" if missing[1:] else "is"
    return f"{' and '.join(missing)} {verb} not installed{purpose and ' '}{purpose}: {remedies}"


def _missing_provider(row: Row) -> str:
    engine = row.way.engine
    if row.device != "cuda" or row.device not in row.way.devices:
        return ""
    if engine == "onnxruntime" and importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "this onnxruntime has no CUDA provider: pip install onnxruntime-gpu, in place of onnxruntime"
    if engine == "pytorch" and importlib.util.find_spec("torch"):
        import torch

        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA device here"
    if engine == "tensorrt" and not Path("/dev/nvidiactl").exists() and not Path("/dev/nvhost-ctrl-gpu").exists():
        return "there is no NVIDIA GPU here"
    return ""


def _missing_library(way: Backend) -> str:
    name = {"onnxruntime": "onnxruntime", "pytorch": "core", "tensorrt": "tensorrt"}.get(way.engine)
    if way.attention != "op" or name is None:
        return ""
    try:
        native.library(name)
    except FileNotFoundError:
        return f"the {name} library of our ops is not built: pip install --force-reinstall . in the source folder"
    return ""


def _missing_precision(row: Row, exists: bool) -> str:
    if row.way.engine == "pytorch":
        known = TORCH_PRECISIONS
    elif row.way.engine == "openvino":
        known = ("fp32",)
    else:
        known = PRECISIONS if exists else limits.PRECISIONS
    return "" if row.precision in known else f"{row.precision} is not to be had there, {' and '.join(known)} only"


def missing_extras() -> list[str]:
    """What would add to a report and is not here."""
    return [
        f"{name} ({purpose})"
        for name, there, purpose in (
            ("matplotlib", importlib.util.find_spec("matplotlib"), "the picture: pip install matplotlib"),
            ("onnx", importlib.util.find_spec("onnx"), "times by part in ONNX Runtime: pip install onnx"),
            ("power sensors", find_sensors(), "NVML, by pip install nvidia-ml-py, or a Jetson's hwmon"),
            ("trtexec", shutil.which("trtexec"), "its own figure beside ours, for engines"),
        )
        if not there
    ]


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litedetr-deploy" / "benchmark"


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
