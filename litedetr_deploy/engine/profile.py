"""The sizes that an engine takes: for every input the smallest, the best and the largest shape."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from ..errors import LiteDetrError
from ..export.limits import SMALLEST_SIDE

BATCH = (1, 1, 4)  # smallest, best, largest

Size = tuple[int, int]  # (height, width)


def check(batch: Sequence[int] | None, image_size: Sequence[Size] | None) -> None:
    """Raise LiteDetrError for sizes that no graph could take; None is for the graph to say."""
    if batch is not None and (len(batch) != 3 or not 1 <= batch[0] <= batch[1] <= batch[2]):
        wanted = "the smallest, the best and the largest, as in 1,1,4"
        raise LiteDetrError(f"the batch is {_text(batch)}; it must be {wanted}.")
    if image_size is None:
        return
    ordered = all(a[i] <= b[i] for a, b in zip(image_size, image_size[1:]) for i in (0, 1))
    if len(image_size) not in (1, 3) or not ordered:
        raise LiteDetrError(
            f"the image size is {_text(image_size)}; it must be one HEIGHTxWIDTH, or the smallest, the best and the "
            "largest with no side smaller than the one before, as in 480x480,800x1333,1333x1333."
        )
    if min(image_size[0]) < SMALLEST_SIDE:
        limit = f"{SMALLEST_SIDE} pixels, the stride of the coarsest feature level"
        raise LiteDetrError(f"the image size is {_text(image_size)}; no side may be smaller than {limit}.")


def shapes(
    inputs: dict[str, tuple[int, ...]], batch: Sequence[int] | None = None, image_size: Sequence[Size] | None = None
) -> dict[str, list[tuple[int, ...]]]:
    """Return for every input its smallest, best and largest shape; raise LiteDetrError for what the graph cannot take.

    inputs: name -> shape in the graph, -1 where any size will do; batch, image_size: see `api.Options`.
    """
    images = next((name for name, shape in inputs.items() if len(shape) == 4), None)
    if images is None:
        raise LiteDetrError(f"the graph has no input of images, [N, 3, H, W], among {', '.join(inputs)}.")
    fixed_batch, _, *fixed = inputs[images]
    if batch is None:
        batch = BATCH if fixed_batch < 0 else (fixed_batch,) * 3
    elif fixed_batch >= 0 and set(batch) != {fixed_batch}:
        fix = "Leave the batch out, or export the model again: `litedetr export` leaves the batch open."
        raise LiteDetrError(f"the batch is {_text(batch)}, and the graph's is fixed at {fixed_batch}. {fix}")
    if image_size is None and min(fixed) < 0:
        fix = "give the smallest, the best and the largest, as in --image-size 480x480,800x1333,1333x1333."
        raise LiteDetrError(f"the graph takes images of any size, and an engine must know which: {fix}")
    sizes = image_size or [(fixed[0], fixed[1])]
    if min(fixed) >= 0 and {tuple(size) for size in sizes} != {tuple(fixed)}:
        raise LiteDetrError(
            f"the image size is {_text(sizes)}, and the graph's is fixed at {fixed[0]}x{fixed[1]}. Leave it out, or "
            "export the model for it: `litedetr export --image-size HEIGHTxWIDTH`, or 'dynamic' for several."
        )
    return {
        name: [_fill(shape, n, size) for n, size in zip(batch, sizes if len(sizes) == 3 else [*sizes] * 3)]
        for name, shape in inputs.items()
    }


def _fill(shape: tuple[int, ...], n: int, size: Size) -> tuple[int, ...]:
    wanted = {4: (n, 3, *size), 3: (n, *size)}.get(len(shape), (n,))  # images, a mask of their pixels, sizes
    return tuple(want if fixed < 0 else fixed for fixed, want in zip_longest(shape, wanted))


def _text(values):
    return ",".join(str(value) if isinstance(value, int) else f"{value[0]}x{value[1]}" for value in values)
