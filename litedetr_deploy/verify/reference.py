"""What PyTorch makes of one image, and whether a contender makes the same of it.

Computed once for a detector and an image size and kept in a file, so that a machine without PyTorch can check too.
See `verify.onnx` for why the choice of queries is compared apart from what follows from it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import assets
from ..artifact import load_onnx, onnx_metadata
from ..files import replaced_when_done
from .probes import make_probes, nudged
from .verdict import Arrays, Verdict, compare, largest, mean

SCORES, INDICES, LOGITS, BOXES = "proposal_scores", "topk_indices", "pred_logits", "pred_boxes"
QUANTITIES = (SCORES, LOGITS, BOXES)
LARGEST, MEAN = dict.fromkeys(QUANTITIES, largest), dict.fromkeys(QUANTITIES, mean)
# What float32 rounding may change.  The floors are twenty times what the official code's outputs move with other
# threads or kernels on small images.  A model can amplify rounding further: PyTorch's own spread is measured, and
# SPREADS of it are allowed, up to the caps, beyond which a difference could show in a detection.
SPREADS = 4
FLOORS = {SCORES: 2e-4, LOGITS: 2e-4, BOXES: 3e-4}  # logits: of the largest magnitude; boxes: of the image's side
CAPS = {SCORES: 1e-2, LOGITS: 1e-2, BOXES: 3e-3}
# What INT8 saturates is a matter of the calibration, and what that costs, of an evaluation: these only stop what has
# nothing in common with PyTorch any more.
INT8_CAPS = {SCORES: 1.0, LOGITS: 0.3, BOXES: 0.15}
# The type whose rounding in PyTorch sets how far a typed model may be off; int8 has about as many bits as bfloat16,
# which stands for it where the graph is not at hand.
ROUNDING = {"fp16": "float16", "bf16": "bfloat16", "int8": "bfloat16"}
TOP = 300  # scores that are compared where nothing tells which queries were chosen


@dataclass(frozen=True)
class Weights:
    """A detector in PyTorch; source: a variant's name, for random weights, always the same; or a checkpoint."""

    source: str
    variant: str | None = None  # of a checkpoint that cannot tell

    @property
    def random(self) -> bool:
        return self.source not in assets.NAMES and not Path(self.source).is_file()

    @functools.cached_property
    def model(self):
        import torch

        from ..model.checkpoints import load_model

        if not self.random:
            return load_model(self.source, self.variant)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return load_model(variant=self.source)


class Reference:
    """The image and PyTorch's outputs on it.

    arrays: images [1, 3, H, W] in 0..1, the outputs of `Detector.forward` that are compared, tolerances as
        'tolerance PRECISION QUANTITY', and 'gflops', the detector's operations on this image in 1e9 multiply-adds.
    """

    def __init__(self, path: Path, weights: Weights | None = None):
        self.path, self._weights = path, weights
        with np.load(path) as file:
            self.arrays = dict(file)

    @property
    def gflops(self) -> float | None:
        return float(self.arrays["gflops"]) if "gflops" in self.arrays else None

    @property
    def checks(self) -> bool:
        return LOGITS in self.arrays

    @property
    def precisions(self) -> list[str]:
        return [precision for precision in ("fp32", *ROUNDING) if f"tolerance {precision} {LOGITS}" in self.arrays]

    def check(self, outputs: dict[str, np.ndarray], precision: str) -> Verdict:
        """Compare what a contender made of `images`, or of a batch of copies of it, with what PyTorch made.

        outputs: pred_logits and pred_boxes, or scores; and where it can tell them, proposal_scores and topk_indices.
        """
        verdict, wanted = Verdict(), self.arrays
        tolerance = {name: float(wanted[f"tolerance {precision} {name}"]) for name in QUANTITIES}
        tolerance["best scores"] = 2 * tolerance[LOGITS]
        # A rounding of half precision can turn single queries: there the mean counts.
        distance = largest if precision == "fp32" else mean

        def agree(case: str, outputs: dict, wanted: dict) -> bool:
            return compare(outputs, wanted, {name: tolerance[name] for name in outputs}, verdict, case, distance).passed

        def compare_best(logits: np.ndarray, count: int) -> Verdict:
            both = (np.sort(values.astype(np.float64).ravel())[-count:] for values in (logits, wanted[LOGITS]))
            agree("an image", *({"best scores": values} for values in both))
            return verdict

        if LOGITS not in outputs:
            scores = outputs["scores"][0].astype(np.float64)
            with np.errstate(divide="ignore", invalid="ignore"):
                return compare_best(np.log(scores / (1 - scores)), scores.size)
        first = {name: outputs[name][:1] for name in (*QUANTITIES, INDICES) if name in outputs}
        copies = {name: np.repeat(first[name], len(outputs[name]), 0) for name in (LOGITS, BOXES)}
        if not agree("copies of the image", {name: outputs[name] for name in copies}, copies):
            return verdict
        if INDICES not in outputs:
            return compare_best(first[LOGITS], TOP)
        agree("an image", {SCORES: first[SCORES]}, wanted)
        indices = first[INDICES].astype(np.int64)
        if precision == "fp32":
            verdict.add("an image", "choice of queries", choice_error(wanted[SCORES], indices), tolerance[SCORES])
        if not np.array_equal(indices, wanted[INDICES]):
            if self._weights is None:
                verdict.add("an image", "queries in another place, a share", (indices != wanted[INDICES]).mean(), 0.5)
                return verdict
            wanted = run_pytorch(self._weights.model, wanted["images"], indices)
        agree("given the same queries", {name: first[name] for name in (LOGITS, BOXES)}, wanted)
        return verdict


def choice_error(scores: np.ndarray, indices: np.ndarray) -> float:
    """Return by how much scores [N, S] speak against having picked `indices` [N, Q], in this order, as the top ones."""
    best = -np.sort(-scores, axis=1)[:, : indices.shape[1]]
    return largest(np.take_along_axis(scores, indices, axis=1) - best)


def tolerances(other: Arrays, wanted: Arrays, floors=FLOORS, caps=CAPS, distances=LARGEST) -> dict[str, float]:
    """Return how far each value may be off, from what PyTorch makes of it with another rounding."""
    found = {}
    for name in QUANTITIES:
        scale = 1.0 if name == BOXES else max(1.0, float(np.abs(wanted[name]).max()))
        spread = distances[name](other[name] - wanted[name]) if np.isfinite(other[name]).all() else 0.0
        found[name] = float(np.clip(SPREADS * spread, floors[name] * scale, caps[name] * scale))
    return found


def make_reference(
    path: Path, weights: Weights, image_size: tuple[int, int], precisions: Iterable[str],
    known: Reference | None = None, graph: Path | None = None,
) -> Reference:  # fmt: skip
    """Run PyTorch on a drawn image and write its `Reference` to `path`.

    known: the same for other precisions, which is kept; graph: an ONNX model in INT8, of which the tolerances of that
    precision are made.
    """
    import torch

    from ..model.flops import count_flops

    model = weights.model
    if known is None:
        images = make_probes(None, image_size, False)[0].image
        gflops = count_flops(model.config, image_size).total("fvcore") / 1e9
        arrays = {"images": images, **run_pytorch(model, images), "gflops": np.array(gflops)}
    else:
        arrays = known.arrays
    images, wanted = arrays["images"], {name: arrays[name] for name in (*QUANTITIES, INDICES)}
    for precision in precisions:
        if precision == "fp32":  # how far PyTorch's own rounding goes in this model
            found = tolerances(run_pytorch(model, nudged(images), wanted[INDICES]), wanted)
        elif precision == "int8" and graph is not None:  # how far the graph's goes
            from .typed import rounding_twin

            proto = load_onnx(graph)
            half = None if onnx_metadata(proto, graph).get("target") == "cpu" else torch.float16
            other = run_pytorch(rounding_twin(model, proto, half), images, wanted[INDICES])
            found = tolerances(other, wanted, _floors(torch.bfloat16), INT8_CAPS, MEAN)
        else:
            half = getattr(torch, ROUNDING[precision])
            caps = dict.fromkeys(QUANTITIES, np.inf)
            found = tolerances(run_pytorch(model, images, wanted[INDICES], half), wanted, _floors(half), caps, MEAN)
        arrays |= {f"tolerance {precision} {name}": np.array(value) for name, value in found.items()}
    return _write(path, arrays, weights)


def _floors(half) -> dict[str, float]:
    import torch

    return dict.fromkeys(QUANTITIES, 0.5 * torch.finfo(half).eps)


def make_image(path: Path, image_size: tuple[int, int]) -> Reference:
    """Write a `Reference` that has the image alone."""
    return _write(path, {"images": make_probes(None, image_size, False)[0].image})


def _write(path: Path, arrays: dict, weights: Weights | None = None) -> Reference:
    with replaced_when_done(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    return Reference(path, weights)


def run_pytorch(model, images: np.ndarray, indices=None, dtype=None, mask=None) -> dict[str, np.ndarray]:
    """Return the outputs that are compared, for a choice of queries and with the matrices in `dtype` where given.

    images [N, 3, H, W] in 0..1; mask [N, H, W], True = padding.
    """
    import torch

    from ..model.deployed import Deployed

    padding = None if mask is None else torch.from_numpy(mask)
    forced = None if indices is None else torch.from_numpy(indices.astype(np.int64))
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        values = model(Deployed(model, "raw").normalise(torch.from_numpy(images), padding), padding, forced)
    return {name: values[name].float().numpy() for name in QUANTITIES} | {INDICES: values[INDICES].numpy()}
