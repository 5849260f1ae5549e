"""What an artifact is verified on: images, of which the package draws one where none is given, and noise."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..assets.shapes import scene
from ..runtime.images import load_image, prepare

SEED = 3  # of the drawn image; the shapes' training and validation have others
SIZE = (480, 640)  # of the drawn image, (height, width)


class Probe(NamedTuple):
    """One image as a model takes it."""

    name: str
    image: np.ndarray  # [1, 3, H, W] float32 in 0..1
    mask: np.ndarray | None  # [1, H, W] bool, True = padding; None for a model without a mask


def drawn_image() -> Image.Image:
    return scene(0, SEED, SIZE)[0]


def make_probes(images: Sequence | None, size: tuple[int, int], masked: bool) -> list[Probe]:
    """Return images, as `load_image` takes them, as inputs of (height, width) `size`, then noise.

    Of a model that takes a mask, images are letterboxed and a border of the noise is padding.
    """
    height, width = size
    probes = []
    for i, image in enumerate(images or [drawn_image()]):
        pixels, mask, _ = prepare(load_image(image), "letterbox" if masked else "stretch", size)
        probes.append(Probe(f"image {i + 1}", pixels[None], mask[None] if masked else None))
    noise = np.random.default_rng(0).random((1, 3, height, width), np.float32)
    mask = np.zeros((1, height, width), bool)
    mask[:, height * 7 // 8 :], mask[:, :, width * 5 // 6 :] = True, True
    return [*probes, Probe("noise", noise, mask if masked else None)]


def stack(probes: Sequence[Probe]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return images [N, 3, H, W] and masks [N, H, W] of a batch."""
    images = np.concatenate([probe.image for probe in probes])
    return images, None if probes[0].mask is None else np.concatenate([probe.mask for probe in probes])


def feed(inputs: Container[str], images: np.ndarray, masks: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return those of `inputs` that a batch of images [N, 3, H, W] and masks [N, H, W] gives."""
    n, _, height, width = images.shape
    sizes = np.array([[width, height]] * n, np.int64)
    arrays = {"images": images, "orig_target_sizes": sizes, "pixel_mask": masks}
    return {name: array for name, array in arrays.items() if name in inputs}


def nudged(images: np.ndarray) -> np.ndarray:
    """Return images in 0..1 with the last bit of every value changed at random: what rounding alone may change."""
    bits = np.random.default_rng(2).integers(-1, 2, images.shape, np.int32)
    return np.abs((images.view(np.int32) + bits * (images > 0)).view(np.float32))
