"""What a DINO detector is trained to make small: focal, L1 and GIoU losses after Hungarian matching.

Sources: DETR (arXiv 2005.12872), Deformable DETR (arXiv 2010.04159), DINO (arXiv 2203.03605).
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
# Weights of class, box and GIoU: in the matching, and in the loss.
MATCHING_WEIGHTS = (2.0, 5.0, 2.0)
LOSS_WEIGHTS = (1.0, 5.0, 2.0)


def corners(boxes: Tensor) -> Tensor:
    """[..., 4] cxcywh -> xyxy."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), -1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU (arXiv 1902.09630) of boxes [..., 4] cxcywh, which broadcast -> [...]."""
    a_area, b_area = a[..., 2] * a[..., 3], b[..., 2] * b[..., 3]
    a, b = corners(a), corners(b)
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    outer = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = a_area + b_area - inner
    return inner / (union + 1e-7) - (outer - union) / (outer + 1e-7)


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, labels: list[Tensor], wanted: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pairs of prediction and object with the least total cost, one to one.

    logits [N, Q, C], boxes [N, Q, 4]; labels and wanted boxes of every image, [K] and [K, 4].  Returns (image, query)
    of every object, [sum K] each, in the order of the concatenated objects.
    """
    all_labels, all_boxes = torch.cat(labels), torch.cat(wanted)
    p = logits.float().sigmoid()[..., all_labels]  # N, Q, sum K: each image with the objects of all
    positive = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * -(p + 1e-8).log()
    negative = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * -(1 - p + 1e-8).log()
    boxes = boxes.float()
    cost = (
        MATCHING_WEIGHTS[0] * (positive - negative)
        + MATCHING_WEIGHTS[1] * (boxes[:, :, None] - all_boxes).abs().sum(-1)
        - MATCHING_WEIGHTS[2] * generalized_iou(boxes[:, :, None], all_boxes)
    )
    images, queries, first = [], [], 0
    for image, (image_labels, image_cost) in enumerate(zip(labels, cost.cpu().numpy())):
        stop = first + len(image_labels)
        columns, rows = linear_sum_assignment(image_cost[:, first:stop].T)  # the columns come in order
        images.append(torch.full((len(columns),), image))
        queries.append(torch.from_numpy(rows))
        first = stop
    return torch.cat(images).to(logits.device), torch.cat(queries).to(logits.device)


def detection_loss(
    logits: Tensor, boxes: Tensor, matched: tuple[Tensor, Tensor], labels: Tensor, wanted: Tensor, num_objects: float
) -> Tensor:
    """The loss of one set of predictions, a scalar.

    logits [N, Q, C], boxes [N, Q, 4] cxcywh in 0..1; matched (image, query) of every object; labels [K] and wanted
    boxes [K, 4] of these objects; num_objects, what the sums are divided by.
    """
    logits, predicted = logits.float(), boxes[matched].float()
    target = torch.zeros_like(logits)
    target[(*matched, labels)] = 1
    p = logits.sigmoid()
    right = p * target + (1 - p) * (1 - target)
    alpha = FOCAL_ALPHA * target + (1 - FOCAL_ALPHA) * (1 - target)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    class_loss = (alpha * (1 - right) ** FOCAL_GAMMA * entropy).sum()
    box_loss = (predicted - wanted).abs().sum()
    giou_loss = (1 - generalized_iou(predicted, wanted)).sum()
    weighted = zip(LOSS_WEIGHTS, (class_loss, box_loss, giou_loss))
    return sum(weight * loss for weight, loss in weighted) / num_objects
