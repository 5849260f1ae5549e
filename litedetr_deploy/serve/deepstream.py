"""An engine to what DeepStream's nvinfer needs to run it: configuration, labels and libraries in one folder."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..errors import LiteDetrError
from ..files import folder_beside
from ..ops import native
from .source import Source, check_new, copy_library, doubts, read_engine

THRESHOLD = 0.3
PARSER = "NvDsInferParseLiteDetr"  # of plugins/deepstream/parser.cpp
CONFIG = "config_infer.txt"
FORMS = ({"labels", "boxes", "scores"}, {"pred_logits", "pred_boxes"})


@dataclass
class DeepStreamReport:
    """What was written."""

    path: str
    image_size: list[int]  # (height, width) to which nvinfer scales frames
    batch_size: int
    metadata: dict  # of the engine's model
    command: list[str]  # of a pipeline that shows the detections on a video
    warnings: list[str] = field(default_factory=list)
    size_bytes: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict:
        return asdict(self)


def write_folder(
    engine: str | os.PathLike, path: str | os.PathLike, threshold: float = THRESHOLD, allow_unverified: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> DeepStreamReport:  # fmt: skip
    """Write a folder for DeepStream's nvinfer; it appears complete or not at all.

    It holds the engine, config_infer.txt, labels.txt, and the libraries: the parser of the outputs, which registers
    the attention's plugins as well.

    Args:
        engine: path of an engine of `litedetr build --backend tensorrt`, with its report beside it.
        path: of the folder, which does not exist yet.
        threshold: lowest score of an object.
        allow_unverified: also take an engine that is not verified, or was changed since; `warnings` say so.
        progress: called with the name of each stage as it begins.

    Raises LiteDetrError for a folder that exists, for an engine without its report, of images of any size, with another
    input than the images and their sizes, or that is not verified, and where the parser was not built.
    """
    start, engine, path = time.monotonic(), Path(engine), Path(path)
    check_new(path, "a folder")
    if not 0 <= threshold <= 1:
        raise LiteDetrError(f"threshold is {threshold}; it must be between 0 and 1.")
    progress("read the engine")
    source = read_engine(engine)
    warnings = doubts(source, allow_unverified)
    height, width = _size(source)
    batch_size = source.largest_batch(None)
    names = source.metadata.get("class_names") or []
    progress("write the folder")
    with folder_beside(path) as temporary:
        folder = temporary / "deepstream"
        folder.mkdir()
        shutil.copyfile(engine, folder / engine.name)
        for library in ("deepstream", *(("tensorrt", "tensorrt-register") if source.uses_op else ())):
            copy_library(library, folder)
        (folder / "labels.txt").write_text("".join(f"{name}\n" for name in names), "utf-8")
        (folder / CONFIG).write_text(_config(engine.name, height, width, batch_size, len(names), threshold), "utf-8")
        size = sum(file.stat().st_size for file in folder.iterdir())
        os.rename(folder, path)
    return DeepStreamReport(
        str(path), [height, width], batch_size, source.metadata, _pipeline(path / CONFIG, batch_size),
        warnings, size, round(time.monotonic() - start, 1),
    )  # fmt: skip


def _size(source: Source) -> tuple[int, int]:
    """Return height and width of the images of an engine that nvinfer can run."""
    inputs, outputs = ({one.name for one in tensors} for tensors in (source.inputs, source.outputs))
    if "images" not in inputs or inputs - {"images", "orig_target_sizes"} or not any(form <= outputs for form in FORMS):
        raise LiteDetrError(
            f"{source.path} is no detector that DeepStream can run: its inputs are {sorted(inputs)} and its outputs "
            f"{sorted(outputs)}. Wanted: images alone -> pred_logits, pred_boxes (`litedetr export --outputs raw`), or "
            "images and orig_target_sizes -> labels, boxes, scores."
        )
    height, width = next(one.shape[2:] for one in source.inputs if one.name == "images")
    if min(height, width) < 0:
        raise LiteDetrError(
            f"{source.path} takes images of several sizes, and nvinfer scales every frame to one. Export the model "
            "with --image-size HEIGHTxWIDTH."
        )
    return height, width


def _config(engine: str, height: int, width: int, batch_size: int, classes: int, threshold: float) -> str:
    """Return the configuration of nvinfer.  Paths in it are relative to its folder."""
    properties = {
        "gpu-id": 0,
        "gie-unique-id": 1,
        "process-mode": 1,  # whole frames
        "network-type": 0,  # a detector
        "model-engine-file": engine,
        "labelfile-path": "labels.txt",
        "num-detected-classes": classes,
        "batch-size": batch_size,
        "infer-dims": f"3;{height};{width}",
        "net-scale-factor": 1 / 255,  # normalisation is in the model
        "model-color-format": 0,  # RGB
        "maintain-aspect-ratio": 0,
        "scaling-filter": 1,  # bilinear
        "cluster-mode": 4,  # none: a DETR gives each object once
        "custom-lib-path": native.LIBRARIES["deepstream"],
        "parse-bbox-func-name": PARSER,
    }
    lines = [f"{name}={value}" for name, value in properties.items()]
    return "\n".join(["[property]", *lines, "", "[class-attrs-all]", f"pre-cluster-threshold={threshold}", ""])


def _pipeline(config: Path, batch_size: int) -> list[str]:
    """Return the command that shows the detections on one video."""
    words = (
        "gst-launch-1.0 uridecodebin uri=file:///path/to/video.mp4 ! mux.sink_0 nvstreammux name=mux "
        f"batch-size={batch_size} width=1920 height=1080 ! nvinfer CONFIG ! nvvideoconvert ! nvdsosd ! nveglglessink"
    )
    return [word.replace("CONFIG", f"config-file-path={config.absolute()}") for word in words.split()]
