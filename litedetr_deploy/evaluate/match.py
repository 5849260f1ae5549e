"""Detections of two artifacts on the same images, matched to each other."""

from __future__ import annotations

import numpy as np

from ..verify.verdict import largest, mean

SCORE_FLOOR = 0.05  # of the detections that are compared
IOU_FLOOR = 0.5  # of two detections that match
NOTHING = {"largest": None, "mean": None}


def compare_detections(first: dict, second: dict) -> dict:
    """Return how far two sets of detections, image id -> Detections of the same images, agree from SCORE_FLOOR up.  Per
    image, from the best score of `first` down, each takes the one of `second` with the same label that overlaps it
    most, by IOU_FLOOR or more, and is not taken.  The box difference of a match is its largest, over the four
    coordinates, in pixels; the differences are None where nothing matches."""
    counts, box_differences, score_differences = [0, 0], [], []
    for image, one in first.items():
        a, b = _confident(one), _confident(second[image])
        counts = [counts[0] + len(a[0]), counts[1] + len(b[0])]
        for i, j in _matches(a, b):
            box_differences.append(float(np.abs(a[1][i] - b[1][j]).max()))
            score_differences.append(float(abs(a[2][i] - b[2][j])))
    matched = len(box_differences)
    values = {"box_difference_px": np.array(box_differences), "score_difference": np.array(score_differences)}
    return {
        "score_floor": SCORE_FLOOR, "iou_floor": IOU_FLOOR, "matched": matched,
        "unmatched": [count - matched for count in counts],
        **{name: {"largest": largest(x), "mean": mean(x)} if matched else NOTHING for name, x in values.items()},
    }  # fmt: skip


def _confident(found):
    """Return labels, boxes (float64) and scores from SCORE_FLOOR up, best first."""
    order = np.argsort(-found.scores, kind="stable")
    order = order[found.scores[order] >= SCORE_FLOOR]
    return found.labels[order], found.boxes[order].astype(np.float64), found.scores[order].astype(np.float64)


def _matches(a, b):
    free = np.where(a[0][:, None] == b[0], _iou(a[1], b[1]), 0.0)
    for i in range(len(a[0]) if len(b[0]) else 0):
        j = free[i].argmax()
        if free[i, j] >= IOU_FLOOR:
            free[:, j] = 0
            yield i, j


def _iou(a, b):
    """a [A, 4], b [B, 4], (x1, y1, x2, y2) -> [A, B]."""
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    shared = (high - low).clip(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(-1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1] - shared
    return shared / np.where(union > 0, union, 1)
