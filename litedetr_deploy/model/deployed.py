"""The detector as it is deployed: normalisation before it, detections after it; and as PyTorch runs that."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..machine import bounded_threads
from .detector import Detector, take_tokens
from .resnet import folded

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NUM_SELECT = 300  # detections of one image, as the official evaluation keeps

OUTPUTS = {"detections": ("labels", "boxes", "scores"), "raw": ("pred_logits", "pred_boxes")}
# What verification looks at inside the graph, whatever its outputs.
PROBES = ("pred_logits", "pred_boxes", "proposal_scores", "topk_indices")


class Deployed(nn.Module):
    """Images in 0..1 to detections in pixels, or to raw logits and boxes."""

    def __init__(self, detector: Detector, outputs: str):
        super().__init__()
        self.detector, self.outputs = detector, outputs
        std = torch.tensor(IMAGENET_STD)[:, None, None]
        self.register_buffer("scale", 1 / std)
        self.register_buffer("shift", torch.tensor(IMAGENET_MEAN)[:, None, None] / std)

    def forward(self, images: Tensor, orig_target_sizes: Tensor | None = None, pixel_mask: Tensor | None = None):
        """images [N, 3, H, W] RGB in 0..1; orig_target_sizes [N, 2] int64 (width, height); pixel_mask [N, H, W], True =
        padding -> a dict: the outputs of `postprocess` where detections are asked for, then PROBES."""
        raw = self.detector(self.normalise(images, pixel_mask), pixel_mask)
        values = {name: raw[name] for name in PROBES}
        if self.outputs == "detections":
            assert orig_target_sizes is not None
            labels, boxes, scores = postprocess(raw["pred_logits"], raw["pred_boxes"], orig_target_sizes)
            values = {"labels": labels, "boxes": boxes, "scores": scores} | values
        return values

    def normalise(self, images: Tensor, pixel_mask: Tensor | None) -> Tensor:
        normalised = images * self.scale - self.shift
        if pixel_mask is not None:
            # The official loader pads after it normalises: padding is zero there.
            normalised = normalised.masked_fill(pixel_mask[:, None], 0.0)
        return normalised


def postprocess(pred_logits: Tensor, pred_boxes: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """pred_logits [N, Q, classes], pred_boxes [N, Q, 4] cxcywh in 0..1, sizes [N, 2] (width, height) -> labels [N, 300]
    int64, boxes [N, 300, 4] (xyxy, in pixels, not clipped), scores [N, 300] of the best pairs of query and class
    (official models/dino/dino.py, PostProcess)."""
    _, num_queries, num_classes = pred_logits.shape
    logits, pairs = pred_logits.flatten(1).topk(min(NUM_SELECT, num_queries * num_classes), dim=1)
    labels = pairs % num_classes
    # An exact division of small whole numbers; integer division would export as seven nodes.
    boxes = take_tokens(pred_boxes, ((pairs - labels) / num_classes).long())
    centre, half = boxes[..., :2], boxes[..., 2:] * 0.5
    sizes = sizes.to(boxes.dtype)
    boxes = torch.cat((centre - half, centre + half), -1) * torch.cat((sizes, sizes), -1)[:, None]
    return labels, boxes, logits.sigmoid()


class TorchSession:
    """A checkpoint behind the interface of an exported model (see OnnxSession): of dynamic size, with a pixel mask;
    threads: of PyTorch, in the whole process."""

    def __init__(self, model: Detector, threads: int | None = None):
        if threads is not None:
            torch.set_num_threads(bounded_threads(threads))
        self._deployed = Deployed(folded(model), "detections").eval()
        mask = ("batch", "height", "width")
        self.inputs = {"images": ("batch", 3, *mask[1:]), "orig_target_sizes": ("batch", 2), "pixel_mask": mask}
        self.outputs = OUTPUTS["detections"]
        self.metadata = {
            "variant": model.config.name,
            "num_classes": model.config.num_classes,
            "class_names": list(model.class_names) if model.class_names else None,
        }

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on a dict of name -> array; return a dict of name -> array."""
        feed = dict(feed)
        if not feed["pixel_mask"].any():
            del feed["pixel_mask"]  # the model is the same without, and faster
        with torch.inference_mode():
            values = self._deployed(**{name: torch.from_numpy(value) for name, value in feed.items()})
        return {name: values[name].numpy() for name in self.outputs}
