"""An engine against the ONNX model that it was built from, which ONNX Runtime runs on the CPU.

TensorRT's known miscompilations move boxes by hundreds of pixels, give equal images of one batch different results,
or both: so batches hold one image twice, and single images and batches of three are run.
Rounding can make another query win where scores tie, so detections are not compared by their rank: each confident one
must be found again with the same label.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..runtime.postprocess import postprocess
from .probes import Probe, feed, make_probes, stack
from .verdict import Verdict, check_finite, largest

# What may differ: scores (0..1), by rank; and boxes of confident detections, in the mean, as a part of the image's
# longer side.  FP32: the limits of the export's own verification.  Half: the rounding of a typed graph, which ONNX
# Runtime partly computes in FP32, in another order; a miscompiled engine is off by ten times as much.
TOLERANCES = {"fp32": (1e-2, 3e-3), "fp16": (5e-2, 1e-2), "bf16": (1e-1, 3e-2), "int8": (1e-1, 3e-2)}
CONFIDENT = 0.05  # score
FEWEST = 10  # detections that are compared even where none is confident


def verify_engine(session, reference, precision, batch, sizes, images=None, progress=lambda stage: None) -> Verdict:
    """Compare an engine with its ONNX model; undecided where detections of noise would pass for an image's as well.

    Args:
        session, reference: the engine and the ONNX model, both as `OnnxSession`.
        batch: smallest and largest that the engine takes; sizes: (height, width) to try.
        images, progress: as in `verify`.
    """
    verdict = Verdict("the ONNX model", "the engine")
    tells_apart = False
    for height, width in sizes:
        probes = make_probes(images, (height, width), "pixel_mask" in session.inputs)
        progress(f"verify: {height}x{width} in ONNX Runtime")
        wanted = [_detect(reference, [probe])[0] for probe in probes]
        control = Verdict()
        _compare(control, "noise", wanted[-1], wanted[0], precision, max(height, width))
        tells_apart |= not control.passed
        for n in sorted({int(np.clip(n, *batch)) for n in (1, 3)}):
            # A batch of one runs every image; a larger one the first and the last, and the first again.
            groups = [[i] for i in range(len(probes))] if n == 1 else [([0, len(probes) - 1] * n)[:n]]
            for group in groups:
                case = f"{height}x{width}, {probes[group[0]].name if n == 1 else f'batch of {n}'}"
                progress(f"verify: {case}")
                found = _detect(session, [probes[i] for i in group])
                for row, i in enumerate(group):
                    name = case if n == 1 else f"{case}, row {row + 1}"
                    _compare(verdict, name, found[row], wanted[i], precision, max(height, width))
                if n > 2:
                    _compare(verdict, f"{case}, rows 1 and 3", found[2], found[0], precision, max(height, width))
    if not tells_apart:
        verdict.undecided = (
            "the ONNX model finds the same in an image and in noise, within the tolerances. Give images that it finds "
            "something in, and check its weights."
        )
    return verdict


def _detect(session, probes: Sequence[Probe]) -> list[dict[str, np.ndarray]]:
    """Return labels [K], boxes [K, 4] in pixels and scores [K] of each probe, run as one batch."""
    images, masks = stack(probes)
    output, names = session.run(feed(session.inputs, images, masks)), ("labels", "boxes", "scores")
    if "pred_logits" in output:
        sizes = np.array([images.shape[:1:-1]] * len(probes))
        output = dict(zip(names, postprocess(output["pred_logits"], output["pred_boxes"], sizes)))
    return [{name: output[name][row] for name in names} for row in range(len(probes))]


def _compare(verdict: Verdict, case: str, found, wanted, precision: str, side: int) -> None:
    if not check_finite(verdict, case, found, wanted, ("scores", "boxes")):
        return
    score_tolerance, box_tolerance = TOLERANCES[precision]
    difference = largest(np.sort(found["scores"]) - np.sort(wanted["scores"]))
    verdict.add(case, "scores by rank", difference, score_tolerance)
    verdict.add(case, "boxes of confident detections", _box_difference(found, wanted, side), box_tolerance)


def _box_difference(found, wanted, side: int) -> float:
    """Return the mean distance of confident detections to the nearest box of the same label: its largest coordinate
    difference as a part of `side`, 1 where there is none."""
    scores = wanted["scores"]
    chosen = np.argsort(-scores, kind="stable")[: max(FEWEST, int((scores >= CONFIDENT).sum()))]
    distances = np.abs(wanted["boxes"][chosen][:, None] - found["boxes"][None]).max(-1) / side
    distances = np.where(wanted["labels"][chosen][:, None] == found["labels"][None], distances, 1.0)
    return np.minimum(distances.min(1, initial=1.0), 1.0).mean()
