"""What an export can be asked for; imports nothing heavy, so that a wrong wish is refused before torch is loaded."""

from __future__ import annotations

import os

from ..errors import LiteDetrError

ATTENTIONS = ("op", "gather", "gridsample")
OUTPUTS = ("detections", "raw")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
CALIBRATION_IMAGES = 128  # of a larger folder, where no number is asked for
# The first where none is asked for: percentiles cost lite-dino-shapes less than 0.01 AP, extremes a little more; entropy
# cuts what small objects need and cost 0.13.
CALIBRATION_METHODS = ("percentile", "minmax", "entropy")
FIRST_OPSET = 17  # the first with LayerNormalization
LAST_OPSET = {"op": 21, "gather": 21, "gridsample": 19}
# The first whose operators take the precision's types: QuantizeLinear float16, Conv bfloat16.  Below it, it is used.
TYPED_OPSET = {"int8": 19, "bf16": 22}
SMALLEST_SIDE = 64  # pixels: the coarsest level has stride 64


def check(
    attention: str,
    precision: str,
    image_size: tuple[int, int] | None,
    outputs: str,
    opset: int,
    calibrates: bool = False,
    method: str = CALIBRATION_METHODS[0],
) -> None:
    """Raises LiteDetrError with the value and what it may be.

    calibrates: whether something is said about calibration; method: its method.
    """
    for name, value, allowed in (
        ("attention", attention, ATTENTIONS),
        ("precision", precision, PRECISIONS),
        ("outputs", outputs, OUTPUTS),
        ("calibration method", method, CALIBRATION_METHODS),
    ):
        if value not in allowed:
            raise LiteDetrError(f"{name} is {value!r}; it must be {' or '.join(map(repr, allowed))}.")
    if not FIRST_OPSET <= opset <= LAST_OPSET[attention]:
        reason = (
            "from opset 20 on, TensorRT's parser reads GridSample's 'linear' as nearest without a word"
            if attention == "gridsample"
            else "17 is the first with LayerNormalization and runs everywhere"
        )
        raise LiteDetrError(
            f"opset is {opset}; with attention {attention!r} it must be {FIRST_OPSET} to {LAST_OPSET[attention]} "
            f"({reason})."
        )
    if calibrates and precision != "int8":
        raise LiteDetrError(
            f"calibration and sensitivity are for precision 'int8', and the precision is {precision!r}. Leave them "
            "out, or ask for 'int8'."
        )
    if precision == "bf16" and attention == "gridsample":
        raise LiteDetrError(
            f"precision is 'bf16' and attention 'gridsample'; bfloat16 convolutions need opset {TYPED_OPSET['bf16']}, "
            "and from 20 on TensorRT's parser reads GridSample's 'linear' as nearest without a word. Choose attention "
            "'op' or 'gather', or precision 'fp16'."
        )
    if image_size is not None:
        height, width = image_size
        if min(height, width) < SMALLEST_SIDE:
            raise LiteDetrError(
                f"the image size is {height}x{width}; both sides must be at least {SMALLEST_SIDE} pixels, the stride "
                "of the coarsest feature level."
            )


def check_budget(budget: float, data) -> None:
    """Raises LiteDetrError for an AP budget that is no part of 1, or without data to measure AP on."""
    if not 0 <= budget < 1:
        raise LiteDetrError(f"the AP budget is {budget:g}; AP is from 0 to 1: give a small part of it, such as 0.01.")
    if data is None:
        raise LiteDetrError("an AP budget needs annotated images to measure AP on, and there are none: give them.")


def check_tokens(image_size: tuple[int, int] | None, num_queries: int, num_levels: int) -> None:
    """Raises LiteDetrError where an image has fewer feature tokens than the detector selects queries."""
    if image_size is None:
        return
    tokens = sum(
        -(-image_size[0] // stride) * -(-image_size[1] // stride) for stride in (8 << i for i in range(num_levels))
    )
    if tokens < num_queries:
        raise LiteDetrError(
            f"an image of {image_size[0]}x{image_size[1]} has {tokens} feature tokens, fewer than the {num_queries} "
            "queries of the model. Choose a larger image size, such as 256x320."
        )


def calibration_images(source, number: int | None) -> list:
    """The pictures to calibrate on, spread evenly over `source`: a folder, or pictures as paths, PIL images or arrays.

    number: how many; None for all, or CALIBRATION_IMAGES where there are more.
    Raises LiteDetrError for a folder without pictures and for fewer pictures than `number`.
    """
    from ..runtime.images import find_images

    is_path = isinstance(source, (str, os.PathLike))
    images = find_images(source) if is_path else list(source)
    if number is not None and number < 1:
        raise LiteDetrError(f"the number of calibration images is {number}; it must be 1 or more.")
    if len(images) < (number or 1):
        raise LiteDetrError(
            f"there are {len(images)} calibration images{f' in {source}' if is_path else ''}, and {number or 1} are "
            "asked for. Give more of them, or ask for fewer."
        )
    number = number or min(len(images), CALIBRATION_IMAGES)
    return [images[i * len(images) // number] for i in range(number)]
