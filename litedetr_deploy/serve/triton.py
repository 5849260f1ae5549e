"""An artifact to a model repository of the Triton inference server.

A repository holds the detector, and where its inputs and outputs are those of `litedetr export` two models more: one
that makes inputs of image files, and an ensemble of both.  Nothing of this package need be installed where the server
runs: what the Python back end needs of it is copied into the repository.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..artifact import ENGINE_SUFFIXES, check_file
from ..errors import LiteDetrError
from ..export.limits import check_choice
from ..files import folder_beside
from ..ops import native
from ..runtime.detector import Detector
from ..runtime.tensorrt import record_path
from .pbtxt import Word, to_text
from .source import Source, Tensor, check_new, copy_library, doubts, read_engine, read_onnx

BACKENDS = {"python": ".onnx", "onnxruntime": ".onnx", "tensorrt": ".plan"}  # back end -> suffix of what it runs
DEVICES = ("cpu", "gpu")
# What of this package the Python back end imports, and what that needs; a test compares it with pyproject.toml.
_ROOMS = ("__init__.py", "artifact.py", "errors.py", "files.py", "machine.py", "ops", "runtime")
# The Python back end of Triton's release 24.10 takes the arrays of NumPy 2 for empty ones.
_REQUIREMENTS = ["numpy>=1.26,<2", "pillow>=10.1,<14", "tomli>=2,<3; python_version < '3.11'"]
_RUNTIMES = {"cpu": "onnxruntime>=1.19,<2", "gpu": "onnxruntime-gpu>=1.19,<2"}
_PACKAGE = Path(__file__).parents[1]
_START = """\
#!/bin/sh
# Start Triton on this repository.  Arguments are passed on; TRITONSERVER is the program, tritonserver when not set.
set -eu
repository=$(cd "$(dirname "$0")" && pwd)
exec "${{TRITONSERVER:-tritonserver}}" {flags} "$@"
"""


@dataclass
class RepositoryReport:
    """What was written."""

    path: str
    name: str  # of the detector's model
    backend: str
    device: str
    models: list[str]
    max_batch_size: int  # 0 where the model takes no batches
    instances: int
    metadata: dict  # of the artifact
    command: list[str]  # that starts a server; start.sh in the repository does the same
    requirements: list[str] = field(default_factory=list)  # of the server's Python; requirements.txt has them too
    op_library: str | None = None  # where the ONNX Runtime back end looks for it
    warnings: list[str] = field(default_factory=list)
    size_bytes: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict:
        return asdict(self)


def write_repository(
    model: str | os.PathLike, path: str | os.PathLike, backend: str | None = None, name: str | None = None,
    max_batch_size: int | None = None, instances: int = 1, device: str | None = None, op_library: str | None = None,
    allow_unverified: bool = False, progress: Callable[[str], None] = lambda stage: None,
) -> RepositoryReport:  # fmt: skip
    """Write a model repository for Triton; it appears complete or not at all.

    Args:
        model: path of an ONNX model of `litedetr export` or `litedetr fuse`, or of an engine of `litedetr build`, with
            its report beside it.
        path: of the repository, a folder that does not exist yet.
        backend: 'python', which is the default for an ONNX model, or 'onnxruntime'; 'tensorrt' for an engine.
        name: of the model in the server; the name of the file without its suffix when not given.
        max_batch_size: images that the server may put into one run; 8 when not given, and of an engine what it takes.
        instances: copies of the model that run at a time.
        device: 'cpu' or 'gpu'; the GPU for an engine, else the CPU, when not given.
        op_library: absolute path of the op library where the server will see it, for the back end 'onnxruntime';
            that of its copy in the repository when not given.
        allow_unverified: also serve a model that was not verified, or was changed since; `warnings` say so.
        progress: called with the name of each stage as it begins.

    Raises LiteDetrError for bad options, for a folder that exists, for an engine without its report, and for a model
    that is not verified.
    """
    start, path, model = time.monotonic(), Path(path), Path(model)
    is_engine = model.suffix.lower() in ENGINE_SUFFIXES
    backend = backend or ("tensorrt" if is_engine else "python")
    device = device or ("gpu" if is_engine else "cpu")
    name = name or model.stem
    _check(model, path, backend, name, instances, device)
    progress("read the model")
    source = read_engine(model) if is_engine else read_onnx(model)
    warnings = doubts(source, allow_unverified)
    uses_op = source.uses_op
    if op_library is not None:
        _check_op_library(op_library, backend, uses_op)
    largest = source.largest_batch(max_batch_size)
    report = RepositoryReport(
        str(path), name, backend, device, [name], largest, instances, source.metadata, [],
        warnings=warnings,
    )  # fmt: skip
    progress("write the repository")
    with folder_beside(path) as folder:
        repository = folder / "repository"
        flags = ['--model-repository="$repository"']
        flags += _write_detector(source, report, repository / name, op_library, path.absolute() / name, uses_op)
        if source.is_detector:
            _write_jpeg(source, report, repository)
        if report.requirements:
            (repository / "requirements.txt").write_text("".join(f"{one}\n" for one in report.requirements))
        start_script = repository / "start.sh"
        start_script.write_text(_START.format(flags=" ".join(flags)))
        start_script.chmod(start_script.stat().st_mode | 0o111)
        words = [flag.replace('"$repository"', str(path.absolute())) for flag in flags]
        report.command = ["tritonserver", *words]
        report.size_bytes = sum(file.stat().st_size for file in repository.rglob("*") if file.is_file())
        os.rename(repository, path)
    report.seconds = round(time.monotonic() - start, 1)
    return report


def _check(model: Path, path: Path, backend: str, name: str, instances: int, device: str) -> None:
    """Raise LiteDetrError for options that no model fits."""
    check_choice("backend", backend, tuple(BACKENDS))
    check_choice("device", device, DEVICES)
    check_file(
        model, "an ONNX model, for instance one that `litedetr export` made, or of an engine of `litedetr build`"
    )
    suffix = model.suffix.lower()
    if suffix not in (".onnx", *ENGINE_SUFFIXES):
        raise LiteDetrError(f"the model is {model}; its name must end in .onnx, {' or '.join(ENGINE_SUFFIXES)}.")
    if (backend == "tensorrt") != (suffix in ENGINE_SUFFIXES):
        fix = "Build an engine with `litedetr build`" if backend == "tensorrt" else "Give the engine's ONNX model"
        raise LiteDetrError(
            f"Triton's back end {backend!r} takes {BACKENDS[backend]} files, and the model is {model}. {fix}, or "
            "choose another --backend."
        )
    if backend == "tensorrt" and device == "cpu":
        raise LiteDetrError("device is 'cpu', and TensorRT's engines run on GPUs. Leave it out, or give an ONNX model.")
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        wanted = "letters, digits, '_', '.' and '-', and begin with none of the last two"
        raise LiteDetrError(f"the model's name is {name!r}; it must consist of {wanted}. Give another with --name.")
    if instances < 1:
        raise LiteDetrError(f"instances is {instances}; it must be 1 or more.")
    check_new(path, "a repository")


def _check_op_library(op_library: str, backend: str, uses_op: bool) -> None:
    if backend != "onnxruntime" or not uses_op:
        why = "has none of our ops" if not uses_op else f"runs in the back end {backend!r}, which finds its library"
        raise LiteDetrError(f"op_library is {op_library!r}, and the model {why}. Leave it out.")
    if not os.path.isabs(op_library):
        raise LiteDetrError(
            f"op_library is {op_library!r}; ONNX Runtime takes an absolute path, as in "
            f"/models/detector/{native.LIBRARIES['onnxruntime']}."
        )


def _write_detector(
    source: Source, report: RepositoryReport, folder: Path, op_library: str | None, final: Path, uses_op: bool
) -> list[str]:
    """Write the model itself, which will lie in `final`; return the server's flags, as words of a shell."""
    version = folder / "1"
    version.mkdir(parents=True)
    config = _config(report.name, report.backend, source, report)
    flags = []
    if report.backend == "tensorrt":
        shutil.copyfile(source.path, version / "model.plan")
        shutil.copyfile(record_path(source.path), record_path(version / "model.plan"))
        if source.record.get("options", {}).get("version_compatible"):
            flags.append("--backend-config=tensorrt,version-compatible=true")
        if uses_op and not source.record.get("plugin_inside"):
            copy_library("tensorrt", folder)
            register = copy_library("tensorrt-register", folder)
            flags.append(f'--backend-config=tensorrt,plugins="$repository"/{report.name}/{register.name}')
    else:
        shutil.copyfile(source.path, version / "model.onnx")
        for location in source.beside:
            (version / location).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path.parent / location, version / location)
    if report.backend == "onnxruntime" and uses_op:
        copied = copy_library("onnxruntime", folder)
        report.op_library = op_library or str(final / copied.name)
        config["model_operations"] = {"op_library_filename": report.op_library}
    if report.backend == "python":
        _copy_python("triton_detector.py", version)
        if uses_op:
            copy_library("onnxruntime", version)
        report.requirements = [*_REQUIREMENTS, _RUNTIMES[report.device]]
    names = source.metadata.get("class_names")
    labels = next((output for output in config["output"] if output["name"] == "labels"), None)
    if names and labels:
        (folder / "labels.txt").write_text("".join(f"{' '.join(name.split())}\n" for name in names), "utf-8")
        labels["label_filename"] = "labels.txt"
    (folder / "config.pbtxt").write_text(to_text(config), "utf-8")
    return flags


def _config(name: str, backend: str, source: Source, report: RepositoryReport) -> dict[str, Any]:
    largest = report.max_batch_size
    config: dict[str, Any] = {
        "name": name, "backend": backend, "max_batch_size": largest,
        "input": [_described(source, tensor) for tensor in source.inputs],
        "output": [_described(source, tensor) for tensor in source.outputs],
        "instance_group": [{"count": report.instances, "kind": Word(f"KIND_{report.device.upper()}")}],
        "version_policy": {"latest": {"num_versions": 1}},
    }  # fmt: skip
    if largest > 1:
        # What has come in while the model was busy runs together, as far as its shapes agree; nothing waits for more.
        config["dynamic_batching"] = {"max_queue_delay_microseconds": 0}
    shapes = {tensor.name: source.warmup_dims(tensor) for tensor in source.inputs}
    if None not in shapes.values():
        # A GPU also takes its memory for the largest batch then.
        sizes = sorted({1, largest}) if largest > 1 and report.device == "gpu" else [min(largest, 1)]
        config["model_warmup"] = [
            {
                "name": f"batch of {size}" if size else "one run",
                "batch_size": size,
                "inputs": [
                    {"key": tensor.name, "value": {"data_type": Word(f"TYPE_{tensor.kind}"),
                                                   "dims": shapes[tensor.name], "zero_data": True}}
                    for tensor in source.inputs
                ],
            }
            for size in sizes
        ]  # fmt: skip
    return config


def _described(source: Source, tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "data_type": Word(f"TYPE_{tensor.kind}"), "dims": source.dims(tensor)}


def _write_jpeg(source: Source, report: RepositoryReport, repository: Path) -> None:
    """Write the model that makes inputs of image files, and the ensemble of it and the detector."""
    name, preprocess, ensemble = report.name, f"{report.name}_preprocess", f"{report.name}_jpeg"
    shapes = {
        one.name: tuple(None if size < 0 else size for size in one.shape) for one in (*source.inputs, *source.outputs)
    }
    inputs = {tensor.name: shapes[tensor.name] for tensor in source.inputs}
    session = SimpleNamespace(inputs=inputs, outputs=shapes, metadata=source.metadata, run=None)
    detector = Detector(session)  # which knows how an image becomes the model's input
    image = {"name": "image", "data_type": Word("TYPE_STRING"), "dims": [1]}
    common = {"max_batch_size": report.max_batch_size, "input": [image]}
    parameters = {"resize": detector.resize_mode(), "image_size": json.dumps(detector.image_size)}
    prepares: dict[str, Any] = {
        "name": preprocess, "backend": "python", **common,
        "output": [_described(source, tensor) for tensor in source.inputs],
        "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],
        "version_policy": {"latest": {"num_versions": 1}},
        "parameters": [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()],
    }  # fmt: skip
    steps = (
        (preprocess, ["image"], [tensor.name for tensor in source.inputs]),
        (name, [tensor.name for tensor in source.inputs], [tensor.name for tensor in source.outputs]),
    )
    whole: dict[str, Any] = {
        "name": ensemble, "platform": "ensemble", **common,
        "output": [_described(source, tensor) for tensor in source.outputs],
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": model, "model_version": -1,
                    "input_map": [{"key": one, "value": one} for one in taken],
                    "output_map": [{"key": one, "value": one} for one in given],
                }
                for model, taken, given in steps
            ]
        },
    }  # fmt: skip
    for model, config in ((preprocess, prepares), (ensemble, whole)):
        folder = repository / model
        (folder / "1").mkdir(parents=True)  # empty in an ensemble, and asked for
        (folder / "config.pbtxt").write_text(to_text(config), "utf-8")
        report.models.append(model)
    _copy_python("triton_preprocess.py", repository / preprocess / "1")
    report.requirements = report.requirements or _REQUIREMENTS


def _copy_python(model: str, version: Path) -> None:
    """Write model.py, and what it imports of this package beside it."""
    shutil.copyfile(Path(__file__).with_name(model), version / "model.py")
    target = version / _PACKAGE.name
    target.mkdir()
    for room in _ROOMS:
        if (_PACKAGE / room).is_dir():
            shutil.copytree(_PACKAGE / room, target / room, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(_PACKAGE / room, target / room)
