"""COCO's average precision, by its own evaluation code (pycocotools)."""

from __future__ import annotations

import contextlib
import io

from ..errors import not_installed
from .data import Dataset

# Our names -> places in COCOeval.stats.
METRICS = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5, "AR100": 8}


def import_pycocotools():
    try:
        from pycocotools import coco, cocoeval
    except ImportError as error:
        raise (not_installed(error, "Computing AP") or error) from error
    return coco, cocoeval


def average_precision(dataset: Dataset, detections: dict) -> dict[str, float | None]:
    """Return a dict with METRICS, 0..1 each, None where the data has no object of that size.

    detections: image id -> Detections, whose labels are category ids of the data; an image without an entry has none.
    """
    evaluation = matched(dataset, detections)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluation.accumulate()
        evaluation.summarize()
    values = {name: float(evaluation.stats[place]) for name, place in METRICS.items()}
    return {name: None if value < 0 else value for name, value in values.items()}


def matched(dataset: Dataset, detections: dict):
    """Return pycocotools' COCOeval with the detections matched to the objects, image by image, in its `evalImgs`."""
    coco, cocoeval = import_pycocotools()
    found = []
    for image, one in detections.items():
        for label, (x1, y1, x2, y2), score in zip(one.labels.tolist(), one.boxes.tolist(), one.scores.tolist()):
            width, height = x2 - x1, y2 - y1
            identity = {"id": len(found) + 1, "image_id": image, "category_id": label, "score": score}
            found.append({**identity, "bbox": [x1, y1, width, height], "area": width * height, "iscrowd": 0})
    # COCOeval takes the id 0 for "no match", and data of others often starts there.
    objects = [annotation | {"id": number} for number, annotation in enumerate(dataset.annotations, 1)]
    categories = [{"id": number, "name": name} for number, name in dataset.categories.items()]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        indexes = coco.COCO(), coco.COCO()
        for index, annotations in zip(indexes, (objects, found)):
            index.dataset = {"images": dataset.images, "categories": categories, "annotations": annotations}
            index.createIndex()
        evaluation = cocoeval.COCOeval(*indexes, "bbox")
        evaluation.evaluate()
    return evaluation
