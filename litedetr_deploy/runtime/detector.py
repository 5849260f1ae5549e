"""The detector: an artifact that takes images and returns what is on them."""

import functools
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..artifact import warn_unless_verified
from ..errors import LiteDetrError, nearest
from .images import RESIZE_MODES, load_image, prepare
from .postprocess import postprocess
from .session import open_session


@dataclass
class Detections:
    """What was found on one image, best score first."""

    labels: np.ndarray  # [K] int64
    boxes: np.ndarray  # [K, 4] float32, (x1, y1, x2, y2) in pixels of the image as given
    scores: np.ndarray  # [K] float32, 0..1
    names: list[str] | None = None  # [K] str, where the artifact or the caller knows them

    def __len__(self):
        return len(self.labels)


class Detector:
    """Runs an artifact on images; with a `Notice` where it is not verified, or was changed since.

    artifact: path of an ONNX model that `litedetr export` made, or of an engine (.plan, .engine) that `litedetr build`
        made from one; or a session, which has what `OnnxSession` has.
    class_names: name of each label; those in the artifact when not given.
    providers, threads, runtime ('onnxruntime' or 'openvino'), precision, throughput: as `open_session` takes them.

    Raises LiteDetrError when the artifact cannot be loaded or does not have a detector's inputs and outputs.
    """

    def __init__(
        self, artifact, providers=None, threads=None, class_names=None, runtime=None, precision=None, throughput=False
    ):
        given = hasattr(artifact, "run")
        options = providers, threads, runtime, precision, throughput
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

    def predict(self, images, threshold: float = 0, batch_size: int = 1, resize: str | None = None) -> list[Detections]:
        """Return a list with the `Detections` of each image, their boxes clipped to it.

        images: one image or an iterable of them, each as `load_image` takes it.
        threshold: detections with a lower score are dropped.
        batch_size: images a run at most.  More than 1 pays where images share a size after the resize.
        resize: 'shortest_edge', 'stretch' or 'letterbox' (see `prepare`).  Not given, it is the official evaluation's
            'shortest_edge' for a model of dynamic size; for a fixed size 'letterbox' where the model takes a pixel
            mask, else 'stretch'.

        Raises LiteDetrError for an image that cannot be read and for a `resize` that the model cannot take.
        """
        return list(self.stream(images, threshold, batch_size, resize))

    def stream(
        self, images, threshold: float = 0, batch_size: int = 1, resize: str | None = None, clip: bool = True
    ) -> Iterator[Detections]:
        """As `predict`, but yield the `Detections` as they come: `images` can be a generator without end.

        clip: False leaves the boxes as the official evaluation takes them, which can stand out of the image.
        """
        if batch_size < 1:
            raise LiteDetrError(f"batch_size is {batch_size}; it must be 1 or more.")
        mode = self.resize_mode(resize)
        is_array = isinstance(images, np.ndarray) and images.ndim < 4 and images.shape != (0,)
        if is_array or isinstance(images, (str, bytes, os.PathLike, Image.Image)):
            images = [images]
        taken: deque = deque()  # batches that are running

        def feeds():
            for batch in _batches((prepare(load_image(image), mode, self.image_size) for image in images), batch_size):
                taken.append(batch)
                yield self._feed(batch)

        run = getattr(self.session, "stream", functools.partial(map, self.session.run))
        for output in run(feeds()):
            yield from self._found(taken.popleft(), output, threshold, clip)

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

    def _found(self, batch, output, threshold, clip):
        sizes = _sizes(batch)
        if self.raw:
            found = postprocess(output["pred_logits"], output["pred_boxes"], sizes)
        else:
            found = output["labels"], output["boxes"], output["scores"]
        for labels, boxes, scores, size in zip(*found, sizes):
            keep = scores >= threshold
            if clip:
                boxes = np.clip(boxes, 0, np.tile(size, 2).astype(boxes.dtype))
            yield Detections(labels[keep], boxes[keep], scores[keep], self._names(labels[keep]))

    def _names(self, labels):
        known = self.class_names
        return None if known is None else [known[i] if i < len(known) else f"class {i}" for i in labels]


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
