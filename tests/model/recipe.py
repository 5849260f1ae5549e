"""Weights of the official models by recipe: every tensor follows from its official key and its shape alone.

For the models whose heads differ between layers and for Swin, which tests/golden/weights.py does not know.  Plain
numpy, so that the official code can be run with the same weights.
"""

import zlib

import numpy as np

# Of the weights that score proposals, such that the many zeroed tokens, which all score the same, are not chosen.
SALT = "1"


def make_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """float32 arrays for {official key: shape}; heads that a model shares with its decoder are equal."""
    return {key: _weight(key.replace("transformer.decoder.class_embed", "class_embed")
                         .replace("transformer.decoder.bbox_embed", "bbox_embed"), shape)
            for key, shape in shapes.items()}  # fmt: skip


def _weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    offset, scale = _rule(key, shape)
    salt = SALT if key == "class_embed.6.weight" else ""
    uniform = np.random.Generator(np.random.PCG64(zlib.crc32((key + salt).encode()))).random(shape) - 0.5
    return (offset + scale * np.sqrt(12) * uniform).astype(np.float32)


def _rule(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation."""
    *_, module, leaf = key.split(".")
    if leaf == "running_var":
        return 1.0, 0.25
    if leaf == "relative_position_bias_table" or key == "transformer.level_embed":
        return 0.0, 0.5
    if module == "query_embed":
        return 0.0, 1.0
    if len(shape) == 1:
        if leaf == "weight":  # of norms; small at the end of a ResNet's block, so that its output does not grow
            return (0.2, 0.04) if module == "bn3" else (1.0, 0.1)
        if module == "sampling_offsets":
            return 0.0, 1.5  # pixels
        return (-3.0, 0.2) if key.startswith("class_embed") else (0.0, 0.1)
    spread = (1.0 if len(shape) == 2 else 2.0) / np.prod(shape[1:])
    if module == "sampling_offsets":
        return 0.0, 0.06
    if key.startswith("bbox_embed") and ".layers.2." in key:
        spread *= 0.3  # boxes move, and stay in the image
    return 0.0, float(np.sqrt(spread))


def image(seed: int, height: int, width: int) -> np.ndarray:
    """[3, height, width], float32: blocks of noise of several sizes, like a normalised photograph."""
    random = np.random.Generator(np.random.PCG64(seed))
    total = np.zeros((3, height, width))
    for side in (1, 8, 32):
        noise = random.random((3, -(-height // side), -(-width // side))) - 0.5
        total += np.repeat(np.repeat(noise, side, 1), side, 2)[:, :height, :width]
    return (2 * total).astype(np.float32)


# Two images of different size, padded to the common one; (seed, height, width).
IMAGES = ((1, 170, 236), (2, 201, 190))


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Images [2, 3, 201, 236] and mask [2, 201, 236], True = padding."""
    height, width = max(i[1] for i in IMAGES), max(i[2] for i in IMAGES)
    images, mask = np.zeros((2, 3, height, width), np.float32), np.ones((2, height, width), bool)
    for row, (seed, h, w) in enumerate(IMAGES):
        images[row, :, :h, :w], mask[row, :h, :w] = image(seed, h, w), False
    return images, mask
