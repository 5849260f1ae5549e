"""What an export can be asked for; imports nothing, so that a wrong wish is refused before torch is loaded."""

from __future__ import annotations

from ..errors import LiteDetrError

ATTENTIONS = ("op", "gather", "gridsample")
OUTPUTS = ("detections", "raw")
PRECISIONS = ("fp32",)
FIRST_OPSET = 17  # the first with LayerNormalization
LAST_OPSET = {"op": 21, "gather": 21, "gridsample": 19}
SMALLEST_SIDE = 64  # pixels: the coarsest level has stride 64


def check(attention: str, precision: str, image_size: tuple[int, int] | None, outputs: str, opset: int) -> None:
    """Raises LiteDetrError with the value and what it may be."""
    for name, value, allowed in (
        ("attention", attention, ATTENTIONS),
        ("precision", precision, PRECISIONS),
        ("outputs", outputs, OUTPUTS),
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
    if image_size is not None:
        height, width = image_size
        if min(height, width) < SMALLEST_SIDE:
            raise LiteDetrError(
                f"the image size is {height}x{width}; both sides must be at least {SMALLEST_SIDE} pixels, the stride "
                "of the coarsest feature level."
            )


def check_tokens(image_size: tuple[int, int] | None, num_queries: int, num_levels: int) -> None:
    """Raises LiteDetrError where an image has fewer feature tokens than the detector selects queries."""
    if image_size is None:
        return
    tokens = sum(-(-image_size[0] // stride) * -(-image_size[1] // stride) for stride in (8 << i for i in range(num_levels)))
    if tokens < num_queries:
        raise LiteDetrError(
            f"an image of {image_size[0]}x{image_size[1]} has {tokens} feature tokens, fewer than the {num_queries} "
            "queries of the model. Choose a larger image size, such as 256x320."
        )
