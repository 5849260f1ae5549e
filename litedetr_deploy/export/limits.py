"""What an export can be asked for; imports nothing heavy, so that bad options are refused before torch is loaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import LiteDetrError, Notice, nearest

ATTENTIONS = ("op", "gather", "gridsample")
OUTPUTS = ("detections", "raw")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
INT8_ON_CPU = "int8-cpu"  # in one word the precision 'int8' for the target 'cpu'
TARGETS = ("gpu", "cpu")
CALIBRATION_IMAGES = 128  # of a larger folder, where no number is asked for
# The first where none is asked for: percentiles cost lite-dino-shapes less than 0.01 AP, extremes a little more;
# entropy cuts what small objects need and cost 0.13.
CALIBRATION_METHODS = ("percentile", "minmax", "entropy")
FIRST_OPSET = 17  # the first with LayerNormalization
LAST_OPSET = {"op": 21, "gather": 21, "gridsample": 19}
# The first whose operators take the precision's types: QuantizeLinear float16, Conv bfloat16.  Below it, it is used.
TYPED_OPSET = {"int8": 19, "bf16": 22}
SMALLEST_SIDE = 64  # pixels: the coarsest level has stride 64
MOST_PIXELS = 4096 * 4096  # of an image: verification holds some hundred bytes of each, for three images at once


_GRIDSAMPLE = "TensorRT's parser reads GridSample's 'linear' as nearest without a word"


@dataclass(frozen=True)
class Int8:
    """How to quantize.  What the images give is kept in `<path>.calibration.json`, and used again as long as the model,
    the images and the method are the same."""

    images: Any = None  # a folder, or paths, PIL images or arrays, like those the model will see; None: use that file
    count: int | None = None  # how many of the images to use; None: all, or CALIBRATION_IMAGES of more
    method: str = CALIBRATION_METHODS[0]
    sensitivity: bool = False  # whether to rank the layers by what quantizing each alone does: in the report
    # How much AP (0..1) may be lost to FP32: the worst layers of that ranking stay half until no more is.
    ap_budget: float | None = None
    ap_of: Callable[[Any], float] | None = None  # measures it of a session, as `litedetr_deploy.evaluate` does

    @property
    def ranks(self) -> bool:
        return self.sensitivity or self.ap_budget is not None

    def check(self) -> None:
        """Raise LiteDetrError for values that are not allowed, with the value and what it may be."""
        check_choice("calibration method", self.method, CALIBRATION_METHODS)
        if self.count is not None and self.count < 1:
            raise LiteDetrError(f"the number of calibration images is {self.count}; it must be 1 or more.")
        if self.images is None and (self.ranks or self.count is not None):
            raise LiteDetrError(
                "sensitivity, an AP budget and a number of calibration images need the images: give a folder of them "
                "(--calibration)."
            )
        if self.ap_budget is not None and not 0 <= self.ap_budget < 1:
            raise LiteDetrError(
                f"the AP budget is {self.ap_budget:g}; AP is from 0 to 1: give a small part of it, such as 0.01."
            )
        if self.ap_budget is not None and self.ap_of is None:
            raise LiteDetrError(
                "an AP budget needs annotated images to measure AP on, and there are none: give --data or --shapes."
            )
        if self.images is not None:
            self.found()

    def found(self) -> list:
        """Return all images; raise LiteDetrError where there are fewer than are asked for."""
        from ..runtime.images import find_images

        is_folder, wanted = isinstance(self.images, (str, os.PathLike)), self.count or 1
        images = find_images(self.images) if is_folder else list(self.images)
        if len(images) < wanted:
            where = f" in {self.images}" if is_folder else ""
            raise LiteDetrError(
                f"there are {len(images)} calibration images{where}, and {wanted} are asked for. Give more of them, or "
                "ask for fewer."
            )
        return images

    def chosen(self) -> list:
        """Return the images to calibrate on, evenly spread over those there are.  Each is opened, so that a damaged one
        (LiteDetrError) does not end an export that took minutes; a single one gives a `Notice`."""
        from ..runtime.images import load_image

        images = self.found()
        count = self.count or min(len(images), CALIBRATION_IMAGES)
        images = [images[i * len(images) // count] for i in range(count)]
        for image in images:
            load_image(image)
        if count == 1:
            warnings.warn("a single image says little about the range of values: calibrate on some hundred", Notice, 3)
        return images


def check(
    attention: str, precision: str, size: tuple[int, int] | None, outputs: str, opset: int, int8: Int8 | None = None,
    target: str = "gpu",
) -> None:  # fmt: skip
    """Raise LiteDetrError for options that are not allowed, with the value and what it may be."""
    check_choice("attention", attention, ATTENTIONS)
    check_choice("precision", precision, PRECISIONS)
    check_choice("outputs", outputs, OUTPUTS)
    check_choice("target", target, TARGETS)
    if target == "cpu" and precision in ("fp16", "bf16"):
        raise LiteDetrError(
            f"precision is {precision!r} and target 'cpu', which lacks kernels for it. Choose 'fp32' or 'int8'; "
            "OpenVINO computes an FP32 model in bfloat16 where the processor has it (--runtime openvino --precision "
            "bf16)."
        )
    if not FIRST_OPSET <= opset <= LAST_OPSET[attention]:
        reason = "17 is the first with LayerNormalization and runs everywhere"
        if attention == "gridsample":
            reason = f"from opset 20 on, {_GRIDSAMPLE}"
        raise LiteDetrError(
            f"opset is {opset}; with attention {attention!r} it must be {FIRST_OPSET} to {LAST_OPSET[attention]} "
            f"({reason})."
        )
    if int8 is not None:
        if precision != "int8":
            raise LiteDetrError(
                f"calibration and sensitivity are for precision 'int8', and the precision is {precision!r}. Leave "
                "them out, or ask for 'int8'."
            )
        int8.check()
    if precision == "bf16" and attention == "gridsample":
        raise LiteDetrError(
            f"precision is 'bf16' and attention 'gridsample'; bfloat16 convolutions need opset {TYPED_OPSET['bf16']}, "
            f"and from 20 on {_GRIDSAMPLE}. Choose attention 'op' or 'gather', or precision 'fp16'."
        )
    if size is not None:
        check_size(*size)


def check_size(height: int, width: int) -> None:
    """Raise LiteDetrError for an image that no detector takes."""
    if min(height, width) < SMALLEST_SIDE:
        raise LiteDetrError(
            f"the image size is {height}x{width}; both sides must be at least {SMALLEST_SIDE} pixels, the stride "
            "of the coarsest feature level."
        )
    if height * width > MOST_PIXELS:
        raise LiteDetrError(
            f"the image size is {height}x{width}, {height * width:,} pixels; {MOST_PIXELS:,} are supported, as in "
            "4096x4096. Choose a smaller size, and cut large images into tiles."
        )


def check_tokens(height: int, width: int, num_queries: int, num_levels: int) -> None:
    """Raise LiteDetrError where an image has fewer feature tokens than the detector selects queries."""
    tokens = sum(-(-height // (8 << level)) * -(-width // (8 << level)) for level in range(num_levels))
    if tokens < num_queries:
        raise LiteDetrError(
            f"an image of {height}x{width} has {tokens} feature tokens, fewer than the {num_queries} queries of the "
            "model. Choose a larger image size, such as 256x320."
        )


def split(precision: str) -> tuple[str, str]:
    """Return the precision and the target of an export that `precision`, of PRECISIONS or INT8_ON_CPU, stands for."""
    return ("int8", "cpu") if precision == INT8_ON_CPU else (precision, "gpu")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise LiteDetrError(f"{name} is {value!r}; it must be {choices}.{nearest(value, allowed)}")
