"""The sizes that an engine takes: for every input the smallest, the best and the largest shape."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import LiteDetrError
from ..export.limits import SMALLEST_SIDE

BATCH = (1, 1, 4)  # smallest, best, largest
# Where the two sides of the image are among an input's dimensions.
SIDES = {"images": (2, 3), "pixel_mask": (1, 2)}

Size = tuple[int, int]  # (height, width)


def check(batch: Sequence[int] | None, image_size: Sequence[Size] | None) -> None:
    """Raise LiteDetrError for sizes that no graph could take; None is for the graph to say."""
    if batch is not None and (len(batch) != 3 or not 1 <= batch[0] <= batch[1] <= batch[2]):
        raise LiteDetrError(
            f"the batch is {_text(batch)}; it must be the smallest, the best and the largest, as in 1,1,4."
        )
    if image_size is None:
        return
    ordered = all(a[i] <= b[i] for a, b in zip(image_size, image_size[1:]) for i in (0, 1))
    if len(image_size) not in (1, 3) or not ordered:
        raise LiteDetrError(
            f"the image size is {_text(image_size)}; it must be one HEIGHTxWIDTH, or the smallest, the "
            "best and the largest with no side smaller than the one before, as in "
            "480x480,800x1333,1333x1333."
        )
    if min(image_size[0]) < SMALLEST_SIDE:
        raise LiteDetrError(
            f"the image size is {_text(image_size)}; no side may be smaller than {SMALLEST_SIDE} "
            "pixels, the stride of the coarsest feature level."
        )


def shapes(
    inputs: dict[str, tuple[int, ...]], batch: Sequence[int] | None = None, image_size: Sequence[Size] | None = None
) -> dict[str, list[tuple[int, ...]]]:
    """Return for every input its smallest, best and largest shape.

    Args:
        inputs: name -> shape in the graph, -1 where any size will do.
        batch: smallest, best and largest batch; BATCH when not given.
        image_size: one (height, width) or the same three; a graph of fixed size needs none.

    Raises:
        LiteDetrError: for what the graph cannot take.
    """
    chosen = {0: _batch(inputs["images"][0], batch)}
    for axis, sizes in zip(SIDES["images"], zip(*_sizes(inputs["images"][2:], image_size))):
        chosen[axis] = sizes
    profile = {}
    for name, shape in inputs.items():
        axes = {0: 0, **dict(zip(SIDES.get(name, ()), SIDES["images"]))}
        profile[name] = [
            tuple(size if size >= 0 else chosen[axes[axis]][k] for axis, size in enumerate(shape)) for k in range(3)
        ]
    return profile


def _batch(fixed, batch):
    if batch is None:
        return BATCH if fixed < 0 else (fixed,) * 3
    if fixed >= 0 and set(batch) != {fixed}:
        raise LiteDetrError(
            f"the batch is {_text(batch)}, and the graph's is fixed at {fixed}. Leave the batch out, "
            "or export the model again: `litedetr export` leaves the batch open."
        )
    return batch


def _sizes(fixed, image_size):
    """Return three (height, width)."""
    if image_size is None:
        if min(fixed) < 0:
            raise LiteDetrError(
                "the graph takes images of any size, and an engine must know which: give the "
                "smallest, the best and the largest, as in --image-size 480x480,800x1333,1333x1333."
            )
        return [fixed] * 3
    if min(fixed) >= 0 and {tuple(size) for size in image_size} != {tuple(fixed)}:
        raise LiteDetrError(
            f"the image size is {_text(image_size)}, and the graph's is fixed at "
            f"{fixed[0]}x{fixed[1]}. Leave it out, or export the model for it: `litedetr export "
            "--image-size HEIGHTxWIDTH`, or 'dynamic' for several."
        )
    return image_size if len(image_size) == 3 else [image_size[0]] * 3


def _text(values):
    return ",".join(str(value) if isinstance(value, int) else f"{value[0]}x{value[1]}" for value in values)
