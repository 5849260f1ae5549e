"""Raw logits and boxes to detections, as the official post-processing does it."""

import numpy as np

MAX_DETECTIONS = 300


def postprocess(logits: np.ndarray, boxes: np.ndarray, sizes: np.ndarray):
    """Return labels [N, K] int64, boxes [N, K, 4] and scores [N, K], K = min(300, Q * C), best score first.

    logits: [N, Q, C]; boxes: [N, Q, 4], (centre x, centre y, width, height) in 0..1; sizes: [N, 2], (width, height) of
    each image in pixels.  The boxes returned are (x1, y1, x2, y2) in pixels and are not clipped to the image.

    The best are taken over queries x classes, so a query can give several detections.
    """
    batch, _, classes = logits.shape
    flat = logits.reshape(batch, -1)
    # Logits rank like their sigmoids, and do not tie where a sigmoid has saturated.
    best = np.argsort(-flat, axis=1, kind="stable")[:, :MAX_DETECTIONS]
    top = np.take_along_axis(flat, best, axis=1)
    with np.errstate(over="ignore"):  # exp overflows to inf for hopeless logits, which gives the right 0
        scores = 1 / (1 + np.exp(-top))
    queries, labels = np.divmod(best, classes)
    chosen = np.take_along_axis(boxes, queries[:, :, None], axis=1)
    centre, half = chosen[..., :2], chosen[..., 2:] / 2
    corners = np.concatenate([centre - half, centre + half], axis=-1)
    scale = np.tile(np.asarray(sizes, boxes.dtype), 2)[:, None, :]
    return labels.astype(np.int64), corners * scale, scores
