"""The detector: an artifact that takes images and returns what is on them."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..artifact import warn_unless_verified
from ..errors import LiteDetrError, nearest
from .images import RESIZE_MODES, Prepared, load_image, prepare
from .postprocess import postprocess
from .session import open_session
from .sources import ahead, find_sources

if TYPE_CHECKING:
    import supervision

AHEAD = 4  # images that are decoded and resized while the model runs


@dataclass
class Detections:
    """What was found on one image, best score first."""

    labels: np.ndarray  # [K] int64
    boxes: np.ndarray  # [K, 4] float32, (x1, y1, x2, y2) in pixels of the image as given
    scores: np.ndarray  # [K] float32, 0..1
    names: list[str] | None = None  # [K] str, where the artifact or the caller knows them

    def __len__(self):
        return len(self.labels)

    def to_supervision(self) -> supervision.Detections:
        """Return them as `supervision.Detections`, for its trackers, annotators and zones; the names are its
        `data["class_name"]`.

        Raises LiteDetrError when supervision cannot be imported.
        """
        try:
            import supervision
        except ImportError as error:
            fix = "Install it with `pip install supervision`."
            raise LiteDetrError(
                f"to_supervision() needs supervision, which fails to import ({error}). {fix}"
            ) from error
        data: dict[str, Any] = {} if self.names is None else {"class_name": np.array(self.names, str)}
        labels = self.labels.astype(int)
        return supervision.Detections(xyxy=self.boxes, confidence=self.scores, class_id=labels, data=data)


class Detector:
    """Runs an artifact on images; with a `Notice` where it is not verified, or was changed since.

    artifact: path of an ONNX model that `litedetr export` made, or of an engine (.plan, .engine) that `litedetr build`
        made from one; or a session, which has what `OnnxSession` has.
    class_names: name of each label; those in the artifact when not given.
    providers, threads, runtime ('onnxruntime' or 'openvino'), precision, throughput, device: as `open_session` takes
        them.

    Raises LiteDetrError when the artifact cannot be loaded or does not have a detector's inputs and outputs.
    """

    def __init__(
        self, artifact, providers=None, threads=None, class_names=None, runtime=None, precision=None, throughput=False,
        device=None,
    ):  # fmt: skip
        given = hasattr(artifact, "run")
        options = providers, threads, runtime, precision, throughput, device
        self.session = artifact if given else open_session(artifact, *options)
        if isinstance(artifact, (str, os.PathLike)):
            warn_unless_verified(artifact, self.session.metadata)
        self.class_names = class_names or self.session.metadata.get("class_names")
        inputs, outputs = set(self.session.inputs), set(self.session.outputs)
        self.raw = {"pred_logits", "pred_boxes"} <= outputs
        wanted = {"images"} if self.raw else {"images", "orig_target_sizes"}
        gives = self.raw or {"labels", "boxes", "scores"} <= outputs
        if not gives or not wanted <= inputs <= wanted | {"pixel_mask"}:
            raise LiteDetrError(
                f"{artifact} is no detector that can be run: its inputs are {sorted(inputs)} and its outputs "
                f"{sorted(outputs)}. Wanted: images and orig_target_sizes -> labels, boxes, scores, or images -> "
                "pred_logits, pred_boxes. `litedetr export` makes such a model."
            )
        self.takes_mask = "pixel_mask" in inputs
        height, width = self.session.inputs["images"][2:]
        # (height, width) of the input, None when dynamic
        self.image_size = (height, width) if isinstance(height, int) and isinstance(width, int) else None

    def predict(
        self, images, threshold: float = 0, batch_size: int = 1, resize: str | None = None,
        classes: Iterable[int | str] | None = None, max_detections: int | None = None,
    ) -> list[Detections]:  # fmt: skip
        """Return a list with the `Detections` of each image, their boxes clipped to it.

        images: one source or an iterable of them: an image as `load_image` takes it; or what `find_sources` takes: a
            directory, a pattern, a video, of which every frame is an image, a URL, the number of a camera.
        threshold: detections with a lower score are dropped.
        batch_size: images a run at most.  More than 1 pays where images share a size after the resize.
        resize: 'shortest_edge', 'stretch' or 'letterbox' (see `prepare`).  Not given, it is the official evaluation's
            'shortest_edge' for a model of dynamic size; for a fixed size 'letterbox' where the model takes a pixel
            mask, else 'stretch'.
        classes: names or labels; detections of others are dropped.
        max_detections: of an image, the best.

        Raises LiteDetrError for an image that cannot be read, for a source that does not exist or breaks, and for a
        `resize` and `classes` that the model cannot take.
        """
        return list(self.stream(images, threshold, batch_size, resize, True, classes, max_detections))

    def stream(
        self, images, threshold: float = 0, batch_size: int = 1, resize: str | None = None, clip: bool = True,
        classes: Iterable[int | str] | None = None, max_detections: int | None = None,
    ) -> Iterator[Detections]:  # fmt: skip
        """As `predict`, but yield the `Detections` as they come: `images` can be a generator or a stream without end.

        images: also what `prepare` returns.  A source that is named is decoded and resized while the model runs.
        clip: False leaves the boxes as the official evaluation takes them, which can stand out of the image.
        """
        if batch_size < 1:
            raise LiteDetrError(f"batch_size is {batch_size}; it must be 1 or more.")
        if max_detections is not None and max_detections < 1:
            raise LiteDetrError(f"max_detections is {max_detections}; it must be 1 or more.")
        mode = self.resize_mode(resize)
        wanted = None if classes is None else self.find_labels(classes)
        is_array = isinstance(images, np.ndarray) and images.ndim < 4 and images.shape != (0,)
        is_named = isinstance(images, (str, os.PathLike, int))
        if is_array or is_named or isinstance(images, (bytes, Image.Image, Prepared)):
            images = [images]
        ready = (self._prepare(image, mode) for image in _images(images))
        taken: deque = deque()  # batches that are running

        def feeds():
            for batch in _batches(ahead(ready, AHEAD) if is_named else ready, batch_size):
                taken.append(batch)
                yield self._feed(batch)

        run = getattr(self.session, "stream", functools.partial(map, self.session.run))
        for output in run(feeds()):
            yield from self._found(taken.popleft(), output, threshold, clip, wanted, max_detections)

    def prepare(self, image, resize: str | None = None) -> Prepared:
        """Return an image as the model takes it: `stream` does the rest."""
        return self._prepare(image, self.resize_mode(resize))

    def _prepare(self, image, mode: str) -> Prepared:
        return image if isinstance(image, Prepared) else prepare(load_image(image), mode, self.image_size)

    def find_labels(self, classes: Iterable[int | str]) -> np.ndarray:
        """Return the labels, [K] int64, of classes given by name or by label.

        Raises LiteDetrError for a name or a label that the model does not have.
        """
        names, labels = self.class_names or [], []
        for one in [classes] if isinstance(classes, (str, int)) else classes:
            text = str(one).strip()
            if text in names:  # 'N/A' is there several times
                labels += [label for label, name in enumerate(names) if name == text]
            elif text.isdecimal() and (not names or int(text) < len(names)):
                labels.append(int(text))
            elif not names:
                raise LiteDetrError(f"The class is {text!r}, and the model has no class names. Give its label.")
            else:
                known = f"it has {len(names)}, {', '.join(map(repr, names[:3]))} and so on"
                hint = nearest(text, names) or " Give a name, or a label from 0."
                raise LiteDetrError(f"The model has no class {text!r}; {known}.{hint}")
        return np.array(labels, np.int64)

    def resize_mode(self, resize: str | None = None) -> str:
        """Return how `predict` resizes when given `resize`; raise LiteDetrError where the model cannot take that."""
        fixed = self.image_size
        if resize is None:
            return "shortest_edge" if fixed is None else "letterbox" if self.takes_mask else "stretch"
        if resize not in RESIZE_MODES:
            known = ", ".join(RESIZE_MODES) + "." + nearest(resize, RESIZE_MODES)
            raise LiteDetrError(f"resize is {resize!r}; it must be one of {known}")
        if resize == "shortest_edge" and fixed is not None:
            raise LiteDetrError(
                "resize 'shortest_edge' gives every aspect ratio its own size, and the model's is fixed at "
                f"{fixed[0]}x{fixed[1]} (height x width). Use 'stretch' or 'letterbox', or export with `--image-size "
                "dynamic`."
            )
        if resize != "shortest_edge" and fixed is None:
            fix = "Use 'shortest_edge', or export with `--image-size HEIGHTxWIDTH`."
            raise LiteDetrError(f"resize {resize!r} needs a model of fixed size, and this one's is dynamic. {fix}")
        if resize == "letterbox" and not self.takes_mask:
            why = "takes no mask that says where. Use 'stretch', or export with `--pixel-mask`."
            raise LiteDetrError(f"resize 'letterbox' pads the image, and the model {why}")
        return resize

    def _feed(self, batch) -> dict:
        feed = {"images": np.stack([prepared.pixels for prepared in batch])}
        if self.takes_mask:
            feed["pixel_mask"] = np.stack([prepared.mask for prepared in batch])
        return feed if self.raw else feed | {"orig_target_sizes": _sizes(batch)}

    def _found(self, batch, output, threshold, clip, wanted, count):
        sizes = _sizes(batch)
        if self.raw:
            found = postprocess(output["pred_logits"], output["pred_boxes"], sizes)
        else:
            found = output["labels"], output["boxes"], output["scores"]
        for labels, boxes, scores, size in zip(*found, sizes):
            keep = scores >= threshold
            if wanted is not None:
                keep &= np.isin(labels, wanted)
            keep = np.flatnonzero(keep)[:count]
            if clip:
                boxes = np.clip(boxes, 0, np.tile(size, 2).astype(boxes.dtype))
            yield Detections(labels[keep], boxes[keep], scores[keep], self._names(labels[keep]))

    def _names(self, labels):
        known = self.class_names
        return None if known is None else [known[i] if i < len(known) else f"class {i}" for i in labels]


def _images(sources) -> Iterator:
    """Yield the images of sources: those that are named are opened, others given as they are."""
    for one in sources:
        if not isinstance(one, (str, os.PathLike, int)):
            yield one
            continue
        for source in find_sources(one):
            yield from (frame.image for frame in source.read())


def _sizes(batch) -> np.ndarray:
    """The images' own (width, height), [N, 2]."""
    return np.array([prepared.original_size for prepared in batch], np.int64)


def _batches(images, size: int):
    """Give lists of at most `size` successive images of one shape, each as soon as it is full."""
    batch: list = []
    for image in images:
        if batch and image.pixels.shape != batch[0].pixels.shape:
            yield batch
            batch = []
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
