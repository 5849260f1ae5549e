"""Where the elements of a value come from: flat indices, pulled back through nodes that only move data, and through
products and sums with constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from .facts import Facts

SAME_ORDER = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
MOVING = SAME_ORDER | {"Concat", "Expand", "Gather", "SequenceAt", "Slice", "Split", "Tile", "Transpose"}
UNIFORM = 1e-6  # relative difference of factors that are taken for equal: a few roundings in float32


class Source(NamedTuple):
    """Elements of a value: times `scale` plus `shift` they are what the walk started from."""

    value: ir.Value
    flat: np.ndarray  # of every element where the walk started, its place in the value
    scale: np.ndarray | float
    shift: np.ndarray | float


def describe(node: ir.Node | None) -> str:
    """Return what a message calls a node."""
    return "an input of the model" if node is None else f"{node.op_type} {node.name!r}"


def pull(
    node: ir.Node, value: ir.Value, flat: np.ndarray, facts: Facts
) -> list[tuple[ir.Value, np.ndarray | None, np.ndarray]]:
    """Return which inputs of a node of MOVING the elements `flat` of its output `value` are: for every input that is
    read, which of `flat` come from it (None: all), and their places.  Empty for what it cannot tell."""
    if node.op_type == "SequenceAt":  # of a sequence that is a value in pieces
        pieces = node.inputs[0].producer()
        if pieces is None or pieces.op_type != "SplitToSequence":
            return []
        source = pieces.inputs[0]
    else:
        source = node.inputs[0]
    shape = facts.shape(value)
    before = facts.shape(source)
    if shape is None or before is None:
        return []
    if node.op_type in SAME_ORDER:
        return [(source, None, flat)]
    places = list(np.unravel_index(flat, shape))
    if node.op_type == "Concat":
        axis, start, parts = node.attributes["axis"].as_int() % len(shape), 0, []
        for part in node.inputs:
            size = facts.shape(part)
            chosen = np.flatnonzero((places[axis] >= start) & (places[axis] < start + size[axis]))
            if chosen.size:
                moved = [place[chosen] for place in places]
                moved[axis] = moved[axis] - start
                parts.append((part, chosen, np.ravel_multi_index(moved, size)))
            start += size[axis]
        return parts
    moved = _MOVES[node.op_type](node, value, places, before, facts)
    return [] if moved is None else [(source, None, np.ravel_multi_index(moved, before) if before else flat * 0)]


def _transpose(node, value, places, before, facts):
    order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(before))[::-1]
    moved = [None] * len(before)
    for place, axis in zip(places, order):
        moved[axis] = place
    return moved


def _slice(node, value, places, before, facts):
    if len(node.inputs) > 1:
        given = [facts.known(one) for one in node.inputs[1:]]
        if any(array is None and one is not None for array, one in zip(given, node.inputs[1:])):
            return None
        given = [None if array is None else array.tolist() for array in given] + [None] * 2
        starts, _, axes, steps = given[:4]
    else:
        starts = list(node.attributes["starts"].as_ints())
        axes = list(node.attributes["axes"].as_ints()) if "axes" in node.attributes else None
        steps = None
    moved = list(places)
    for i, start in enumerate(starts):
        axis = (axes[i] if axes else i) % len(before)
        step, size = steps[i] if steps else 1, before[axis]
        start = min(max(start + size if start < 0 else start, 0), size if step > 0 else size - 1)
        moved[axis] = start + step * moved[axis]
    return moved


def _split(node, value, places, before, facts):
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % len(before)
    start = 0
    for output in node.outputs:
        if output is value:
            break
        start += facts.shape(output)[axis]
    moved = list(places)
    moved[axis] = moved[axis] + start
    return moved


def _sequence_at(node, value, places, before, facts):
    pieces, index = node.inputs[0].producer(), facts.known(node.inputs[1])
    axis = (pieces.attributes["axis"].as_int() if "axis" in pieces.attributes else 0) % len(before)
    sizes = facts.known(pieces.inputs[1]) if len(pieces.inputs) > 1 else np.array(1)
    if index is None or sizes is None or len(places) != len(before):  # keepdims = 0
        return None
    index = int(index.reshape(()))
    if sizes.ndim:
        start = int(sizes[: index % len(sizes)].sum())
    else:
        start = (index if index >= 0 else index - before[axis] // -int(sizes)) * int(sizes)
    moved = list(places)
    moved[axis] = moved[axis] + start
    return moved


def _gather(node, value, places, before, facts):
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % len(before)
    indices = facts.known(node.inputs[1])
    if indices is None:
        return None
    chosen = places[axis : axis + indices.ndim]
    index = indices[tuple(chosen)] if indices.ndim else np.full(places[0].shape if places else (), indices)
    return [*places[:axis], np.where(index < 0, index + before[axis], index), *places[axis + indices.ndim :]]


def _expand(node, value, places, before, facts):
    return [place if size > 1 else place * 0 for place, size in zip(places[len(places) - len(before) :], before)]


def _tile(node, value, places, before, facts):
    return [place % size for place, size in zip(places, before)]


_MOVES: dict[str, Callable] = {
    "Expand": _expand, "Gather": _gather, "SequenceAt": _sequence_at, "Slice": _slice, "Split": _split,
    "Tile": _tile, "Transpose": _transpose,
}  # fmt: skip


def spread(flat: np.ndarray, shape: tuple[int, ...], narrow: tuple[int, ...]) -> np.ndarray:
    """Return which elements of an operand of shape `narrow` the elements `flat` of a result of `shape` read."""
    if shape == narrow:
        return flat
    places = np.unravel_index(flat, shape)
    kept = [place if size > 1 else place * 0 for place, size in zip(places[len(places) - len(narrow) :], narrow)]
    return np.ravel_multi_index(kept, narrow) if narrow else flat * 0


def uniform(array: np.ndarray | float) -> float | None:
    """Return the number that all elements are; None where they differ."""
    array = np.asarray(array, np.float64)
    first = float(array.flat[0])
    return first if np.abs(array - first).max() <= UNIFORM * abs(first) else None


def walk(start: ir.Value, flat: np.ndarray, facts: Facts) -> list[Source]:
    """Return the values that the elements `flat` of `start` come from, nearest first, as far as data is only moved,
    multiplied by what is known, or shifted by a number."""
    path, source = [], Source(start, flat, 1.0, 0.0)
    while source is not None:
        path.append(source)
        node = source.value.producer()
        source = None if node is None else _step(node, path[-1], facts)
    return path


def _step(node: ir.Node, at: Source, facts: Facts) -> Source | None:
    if node.op_type in MOVING and node.domain in ("", "ai.onnx"):
        parts = pull(node, at.value, at.flat, facts)
        return Source(parts[0][0], parts[0][2], at.scale, at.shift) if len(parts) == 1 else None
    if node.op_type not in ("Add", "Div", "Mul", "Neg", "Sub"):
        return None
    if node.op_type == "Neg":
        return Source(node.inputs[0], at.flat, -at.scale, at.shift)
    shape = facts.shape(at.value)
    if shape is None:
        return None
    first, second = node.inputs
    contents = [facts.known(first), facts.known(second)]
    if (contents[0] is None) == (contents[1] is None):
        return None
    other, content = (second, contents[0]) if contents[0] is not None else (first, contents[1])
    if facts.shape(other) is None or (node.op_type == "Div" and other is second):
        return None
    content = content.astype(np.float64)
    if node.op_type in ("Add", "Sub"):
        number = uniform(content) if content.size else None
        if number is None:
            return None
        if node.op_type == "Sub" and other is second:  # number - x
            scale, shift = -at.scale, at.shift + at.scale * number
        else:
            scale, shift = at.scale, at.shift + at.scale * (number if node.op_type == "Add" else -number)
    else:
        factor = content.flat[0] if content.size == 1 else content.reshape(-1)[spread(at.flat, shape, content.shape)]
        scale, shift = at.scale * factor if node.op_type == "Mul" else at.scale / factor, at.shift
    return Source(other, spread(at.flat, shape, facts.shape(other)), scale, shift)
