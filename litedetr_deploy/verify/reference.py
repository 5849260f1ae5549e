"""What PyTorch makes of one picture, and whether a contender makes the same of it.

Computed once for a detector and an image size and kept in a file, so that a machine without PyTorch can check too.
See `export.verify` for why the choice of queries is compared apart from what follows from it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import assets
from ..files import replaced_when_done

SCORES, INDICES, LOGITS, BOXES = "proposal_scores", "topk_indices", "pred_logits", "pred_boxes"
QUANTITIES = (SCORES, LOGITS, BOXES)
# The type whose rounding in PyTorch sets how far a typed model may be off; int8 has about as many bits as bfloat16.
ROUNDING = {"fp16": "float16", "bf16": "bfloat16", "int8": "bfloat16"}
TOP = 300  # scores that are compared where nothing tells which queries were chosen


@dataclass(frozen=True)
class Weights:
    """A detector in PyTorch.

    source: a variant's name, which stands for random weights, always the same; or a checkpoint as `load_model` takes
        it.
    """

    source: str
    variant: str | None = None  # of a checkpoint that cannot tell

    @property
    def random(self) -> bool:
        return self.source not in assets.NAMES and not Path(self.source).is_file()

    @functools.cached_property
    def model(self):
        import torch

        from ..model.checkpoints.official import load_model

        if not self.random:
            return load_model(self.source, self.variant)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return load_model(variant=self.source)


@dataclass
class Check:
    """rows: dicts with quantity, difference, tolerance, passed."""

    rows: list[dict] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row["passed"] for row in self.rows)

    @property
    def worst(self) -> dict:
        """The row that is closest to its tolerance, or furthest beyond."""
        return max(self.rows, key=lambda row: row["difference"] / row["tolerance"])

    def add(self, quantity: str, difference: float, tolerance: float) -> None:
        difference = float(np.nan_to_num(difference, nan=np.inf))
        passed = difference <= tolerance
        finite = min(difference, float(np.finfo(np.float32).max))
        self.rows.append({"quantity": quantity, "difference": finite, "tolerance": float(tolerance), "passed": passed})


class Reference:
    """The picture and PyTorch's outputs on it.

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
        """Whether it has more than a picture."""
        return LOGITS in self.arrays

    @property
    def precisions(self) -> list[str]:
        """Those that it has tolerances of."""
        return [precision for precision in ("fp32", *ROUNDING) if f"tolerance {precision} {LOGITS}" in self.arrays]

    def check(self, outputs: dict[str, np.ndarray], precision: str) -> Check:
        """outputs: what a contender made of `images`, or of a batch of copies of it: pred_logits and pred_boxes, or
        labels, boxes and scores; and where it can tell them, proposal_scores and topk_indices."""
        check = Check()
        tolerance = {name: float(self.arrays[f"tolerance {precision} {name}"]) for name in QUANTITIES}
        # A rounding of half precision can turn single queries: there the mean counts.
        distance = _largest if precision == "fp32" else _mean
        wanted = self.arrays
        if LOGITS not in outputs:
            logits = np.sort(_logit(outputs["scores"][0].astype(np.float64)))
            best = np.sort(wanted[LOGITS].ravel())[-logits.size :]
            check.add("best scores", distance(logits - best), 2 * tolerance[LOGITS])
            return check
        for name in (LOGITS, BOXES):
            if outputs[name].shape[1:] != wanted[name].shape[1:]:
                check.add(f"shape of {name}", np.inf, 0.5)
                return check
            others = outputs[name] - outputs[name][:1]
            check.add(f"copies of the picture: {name}", distance(others), tolerance[name])
        outputs = {name: outputs[name][:1] for name in (*QUANTITIES, INDICES) if name in outputs}
        if INDICES not in outputs:
            best, wanted_best = (np.sort(array.ravel())[-TOP:] for array in (outputs[LOGITS], wanted[LOGITS]))
            check.add("best scores", distance(best - wanted_best), 2 * tolerance[LOGITS])
            return check
        check.add("token scores", distance(outputs[SCORES] - wanted[SCORES]), tolerance[SCORES])
        if precision == "fp32":
            best = -np.sort(-wanted[SCORES], axis=1)[:, : outputs[INDICES].shape[1]]
            chosen = np.take_along_axis(wanted[SCORES], outputs[INDICES].astype(np.int64), axis=1)
            check.add("choice of queries", _largest(chosen - best), tolerance[SCORES])
        if not np.array_equal(outputs[INDICES], wanted[INDICES]):
            if self._weights is None:
                same = outputs[INDICES][0] == wanted[INDICES][0]
                check.add("queries in another place, a share", 1 - same.mean(), 0.5)
                return check
            wanted = run_pytorch(self._weights.model, wanted["images"], outputs[INDICES])
        check.add("logits", distance(outputs[LOGITS] - wanted[LOGITS]), tolerance[LOGITS])
        check.add("boxes", distance(outputs[BOXES] - wanted[BOXES]), tolerance[BOXES])
        return check


def make_reference(path: Path, weights: Weights, image_size: tuple[int, int], precisions: Iterable[str]) -> Reference:
    """Runs PyTorch on a drawn picture and writes its `Reference` to `path`."""
    import torch

    from ..model.flops import count_flops
    from .onnx import CAPS, FLOORS, SPREADS

    model = weights.model
    images = _draw(image_size)
    wanted = run_pytorch(model, images)
    arrays = {"images": images, **wanted, "gflops": count_flops(model.config, image_size).total("fvcore") / 1e9}
    # The last bit of every pixel changed at random: how far PyTorch's own rounding goes in this model.
    bits = np.random.default_rng(2).integers(-1, 2, images.shape, np.int32)
    nudged = np.abs((images.view(np.int32) + bits * (images > 0)).view(np.float32))
    for precision in precisions:
        if precision == "fp32":
            other = run_pytorch(model, nudged, wanted[INDICES])
        else:
            other = run_pytorch(model, images, wanted[INDICES], getattr(torch, ROUNDING[precision]))
        for name in QUANTITIES:
            scale = 1.0 if name == BOXES else max(1.0, float(np.abs(wanted[name]).max()))
            if precision == "fp32":
                spread = SPREADS * _largest(other[name] - wanted[name])
                tolerance = np.clip(spread, FLOORS[name] * scale, CAPS[name] * scale)
            else:
                rounding = torch.finfo(getattr(torch, ROUNDING[precision])).eps
                tolerance = max(SPREADS * _mean(other[name] - wanted[name]), 0.5 * rounding * scale)
            arrays[f"tolerance {precision} {name}"] = tolerance
    _save(path, arrays)
    return Reference(path, weights)


def make_picture(path: Path, image_size: tuple[int, int]) -> Reference:
    """A `Reference` that has the picture alone."""
    _save(path, {"images": _draw(image_size)})
    return Reference(path)


def _draw(image_size: tuple[int, int]) -> np.ndarray:
    from ..runtime.images import prepare
    from .probes import drawn_image

    return prepare(drawn_image(), "stretch", image_size).pixels[None]


def _save(path: Path, arrays: dict) -> None:
    with replaced_when_done(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def run_pytorch(model, images: np.ndarray, indices: np.ndarray | None = None, dtype=None) -> dict[str, np.ndarray]:
    """The outputs that are compared, given the choice of queries; with the matrices in `dtype` where it is given."""
    import torch

    from ..model.deployed import Deployed

    normalised = Deployed(model, "raw").normalise(torch.from_numpy(images), None)
    indices = None if indices is None else torch.from_numpy(indices.astype(np.int64))
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        values = model(normalised, None, indices)
    return {name: values[name].float().numpy() for name in QUANTITIES} | {INDICES: values[INDICES].numpy()}


def _largest(difference: np.ndarray) -> float:
    return float(np.nan_to_num(np.abs(difference), nan=np.inf).max(initial=0.0))


def _mean(difference: np.ndarray) -> float:
    return float(np.nan_to_num(np.abs(difference), nan=np.inf).mean())


def _logit(scores: np.ndarray) -> np.ndarray:
    return np.log(scores / (1 - scores))
