"""Inputs for a model of which only the graph is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from ..errors import LiteDetrError
from .probes import make_probes

# (batch, image (height, width), other dynamic sizes), where a graph leaves them open.  A batch of 1 would hide which
# axis it is; unlike sides keep height and width apart.
OPEN = ((2, (256, 320), 16), (3, (320, 192), 16))


def make(proto: onnx.ModelProto, given: Mapping[str, np.ndarray] | None = None) -> list[dict[str, np.ndarray]]:
    """Return what a graph can be run on: two sets of inputs, of different sizes where it takes any.

    An input of four axes is an image, drawn in one set and noise in the other; of whole numbers, [N, 2] is the size of
    the images and others, such as masks and tokens, are ones.  given: what some inputs are in both sets.
    """
    given = dict(given or {})
    constants = {tensor.name for tensor in proto.graph.initializer}
    infos = [info for info in proto.graph.input if info.name not in constants]
    names = [info.name for info in infos]
    if unknown := given.keys() - set(names):
        raise LiteDetrError(f"inputs are given for {sorted(unknown)[0]!r}; the model has {', '.join(names)}.")
    infos.sort(key=lambda info: len(info.type.tensor_type.shape.dim) != 4)  # images first: their symbols say the size
    feeds = []
    for turn, (batch, sides, other) in enumerate(OPEN):
        sizes: dict[str, int] = {}
        for info in infos:  # what is given decides
            if info.name in given:
                sizes |= {
                    d.dim_param: n
                    for d, n in zip(info.type.tensor_type.shape.dim, given[info.name].shape)
                    if d.dim_param
                }
        feed = {}
        for info in infos:
            dims = info.type.tensor_type.shape.dim
            shape = []
            for axis, dim in enumerate(dims):
                usual = (
                    batch
                    if axis == 0
                    else (sides[axis - len(dims)] if _has_sides(info) and axis >= len(dims) - 2 else other)
                )
                size = dim.dim_value or sizes.setdefault(dim.dim_param or f"{info.name}.{axis}", usual)
                shape.append(size)
            feed[info.name] = given[info.name] if info.name in given else _content(info, tuple(shape), turn, feed)
        feeds.append(feed)
    return feeds


def feed_any(proto: onnx.ModelProto, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return what a graph can be run on, of which `images` [N, 3, H, W] is its first input of four axes."""
    inputs = (info for info in proto.graph.input if len(info.type.tensor_type.shape.dim) == 4)
    name = next((info.name for info in inputs), None)
    return make(proto, {name: images} if name else None)[0]


def read(path: Path | None) -> dict[str, np.ndarray] | None:
    """Return the arrays of an .npz file; None for no file."""
    if path is None:
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError) as error:
        fix = "Give a file that numpy.savez wrote, with an array for every input that it is to set."
        raise LiteDetrError(f"{path} is no .npz file of arrays: {error}. {fix}") from error


def _has_sides(info: onnx.ValueInfoProto) -> bool:
    """Whether the last two axes are height and width: of images, and of their masks."""
    kind = info.type.tensor_type
    return len(kind.shape.dim) == 4 or (len(kind.shape.dim) == 3 and kind.elem_type not in _FLOATS)


_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)


def _content(
    info: onnx.ValueInfoProto, shape: tuple[int, ...], turn: int, feed: Mapping[str, np.ndarray]
) -> np.ndarray:
    kind = info.type.tensor_type.elem_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    random = np.random.default_rng(turn)
    if kind in _FLOATS:
        if len(shape) == 4 and shape[1] == 3 and turn == 0:
            (scene, _) = make_probes(None, shape[2:], masked=False)
            noise = random.random(shape, np.float32) * 0.05  # images of a batch are not the same
            return (scene.image + noise).astype(dtype)
        return random.random(shape, np.float32).astype(dtype)
    images = next((array for array in feed.values() if array.ndim == 4), None)
    if shape[1:] == (2,) and images is not None:
        return np.tile(np.array(images.shape[:1:-1], dtype), (shape[0], 1))
    # A mask of booleans marks padding, one of numbers what is no padding.
    return np.zeros(shape, dtype) if kind == onnx.TensorProto.BOOL else np.ones(shape, dtype)
