"""An engine against the ONNX model that it was built from, which ONNX Runtime runs on the CPU.

The model was compared with PyTorch when it was exported; what is left to prove is that TensorRT built what it says.
TensorRT's known miscompilations move boxes by hundreds of pixels, give equal images of one batch different results,
or both: so batches hold one image twice, and single images and batches of three are run.

Rounding can make another query win where scores tie, so detections are not compared by their rank: each confident one
must be found again with the same label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..runtime.images import load_image, prepare
from ..runtime.postprocess import postprocess
from ..runtime.sample import sample_images

# What may differ: scores (0..1), by rank; and boxes of confident detections, in the mean, as a part of the image's
# longer side.  FP32: the limits of the export's own verification.  Half: the rounding of a typed graph, which ONNX
# Runtime partly computes in FP32, in another order; a miscompiled engine is off by ten times as much.
TOLERANCES = {"fp32": (1e-2, 3e-3), "fp16": (5e-2, 1e-2), "bf16": (1e-1, 3e-2), "int8": (1e-1, 3e-2)}
CONFIDENT = 0.05  # score
FEWEST = 10  # detections that are compared even where none is confident


def verify_engine(
    session,
    reference,
    precision: str,
    batch: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    images: Sequence | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[dict]:
    """Return rows of what was compared: case, quantity, difference, tolerance, passed.

    session, reference: the engine and the ONNX model, both as `OnnxSession`.
    batch: smallest and largest batch that the engine takes; sizes: (height, width) to try.
    images: pictures, as `load_image` takes them; None: the package draws one.
    """
    rows = []
    pictures = [load_image(image) for image in (images or sample_images(1))]
    batches = sorted({int(np.clip(n, *batch)) for n in (1, 3)})
    for height, width in sizes:
        singles = [_picture(picture, height, width, session) for picture in pictures]
        singles.append(_noise(height, width, session))
        progress(f"verify: {height}x{width} in ONNX Runtime")
        wanted = [_detect(reference, [single], height, width)[0] for single in singles]
        for n in batches:
            # A batch of one runs every image; a larger one the first and the last, and the first again.
            order = [0, len(singles) - 1] * n
            groups = [[i] for i in range(len(singles))] if n == 1 else [order[:n]]
            for group in groups:
                case = f"{height}x{width}, " + (f"image {group[0] + 1}" if n == 1 else f"batch of {n}")
                progress(f"verify: {case}")
                found = _detect(session, [singles[i] for i in group], height, width)
                for row, i in enumerate(group):
                    name = case if n == 1 else f"{case}, row {row + 1}"
                    _compare(rows, name, found[row], wanted[i], precision, max(height, width))
                if n > 2:
                    _compare(rows, f"{case}, rows 1 and 3", found[2], found[0], precision, max(height, width))
    return rows


def _picture(picture, height, width, session):
    masked = "pixel_mask" in session.inputs
    prepared = prepare(picture, "letterbox" if masked else "stretch", (height, width))
    return prepared.pixels, prepared.mask


def _noise(height, width, session):
    image = np.random.default_rng(0).random((3, height, width), np.float32)
    mask = np.zeros((height, width), bool)
    if "pixel_mask" in session.inputs:
        mask[height * 7 // 8 :], mask[:, width * 5 // 6 :] = True, True
    return image, mask


def _detect(session, singles, height, width):
    """Return (labels [K], boxes [K, 4] in pixels, scores [K]) of each (image, mask), run as one batch."""
    sizes = np.array([[width, height]] * len(singles), np.int64)
    feed = {"images": np.stack([image for image, _ in singles])}
    if "pixel_mask" in session.inputs:
        feed["pixel_mask"] = np.stack([mask for _, mask in singles])
    if "orig_target_sizes" in session.inputs:
        feed["orig_target_sizes"] = sizes
    output = session.run(feed)
    if "pred_logits" in output:
        return list(zip(*postprocess(output["pred_logits"], output["pred_boxes"], sizes)))
    return list(zip(output["labels"], output["boxes"], output["scores"]))


def _compare(rows, case, found, wanted, precision, side):
    score_tolerance, box_tolerance = TOLERANCES[precision]
    difference = np.abs(np.sort(found[2]) - np.sort(wanted[2])).max(initial=0.0)
    _add(rows, case, "scores by rank", difference, score_tolerance)
    _add(rows, case, "boxes of confident detections", _box_difference(found, wanted, side), box_tolerance)


def _box_difference(found, wanted, side):
    """The mean, over the confident detections of `wanted`, of the distance to the nearest box of the same label in
    `found`: its largest coordinate difference as a part of `side`, 1 where there is none."""
    labels, boxes, scores = wanted
    order = np.argsort(-scores, kind="stable")
    chosen = order[: max(FEWEST, int((scores >= CONFIDENT).sum()))]
    distances = np.abs(boxes[chosen][:, None] - found[1][None]).max(-1) / side
    distances = np.where(labels[chosen][:, None] == found[0][None], np.nan_to_num(distances, nan=1.0), 1.0)
    return np.minimum(distances.min(1, initial=1.0), 1.0).mean()


def _add(rows, case, quantity, difference, tolerance):
    difference = float(difference)
    rows.append(
        {
            "case": case,
            "quantity": quantity,
            "passed": difference <= tolerance,  # NaN fails
            "difference": difference if np.isfinite(difference) else float(np.finfo(np.float32).max),
            "tolerance": tolerance,
        }
    )
