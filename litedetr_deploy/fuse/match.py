"""Deformable attention in a graph of standard operators, whatever wrote it.

Every GridSample is an anchor.  From it, walks go back to the value and to the sampling locations, and forward to the
weighted sum, through nodes that only move data.  A walk carries the index of every element along, and a value is taken
for an input of the op only if these indices are the permutation that the op reads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from .facts import Facts
from .movement import MOVING, UNIFORM, Source, describe, pull, spread, uniform, walk

REACH = 16  # nodes that only move data between a GridSample and the weighted sum, and behind it
MOST = 1 << 22  # indices of samples that are checked all; of more, every place of each axis and this many combinations
PADDED_LOGIT = -1e4  # of a point that only the op has: nothing after the softmax, and a number in half precision


class NotMatched(Exception):
    """Why a region stays as it is."""


@dataclass(frozen=True)
class Rows:
    """An input of the op in the rows [N, Q, columns] of a value: in `order`, -1 for a point that the graph lacks, and
    times `scale`, None for 1."""

    value: ir.Value
    columns: int
    order: np.ndarray
    scale: np.ndarray | None = None

    @property
    def is_whole(self) -> bool:
        return np.array_equal(self.order.reshape(-1), np.arange(self.columns))


@dataclass(frozen=True)
class Points:
    """Part of the reference points: a value as [N or 1, Q or 1, L or 1, columns], from column `first` on."""

    value: ir.Value
    repeated: tuple[bool, bool, bool]  # over N, Q, L
    columns: int
    first: int


@dataclass(frozen=True)
class Box:
    """Reference points that are the same box everywhere: (x, y, w, h)."""

    box: tuple[float, float, float, float]


@dataclass
class Region:
    """One deformable attention of a graph, and the inputs of the op that replaces it."""

    batch: int  # N
    queries: int  # Q
    heads: int  # M
    channels: int  # D, of a head
    points: tuple[int, ...]  # of every level
    sizes: tuple[tuple[int, int], ...]  # (height, width) of every level
    maps: tuple[ir.Value, ...]  # of every level, as its GridSample reads them
    value: ir.Value  # in the order of [N, S, M*D]
    logits: Rows
    is_weights: bool  # the logits are weights, of which the logarithm is taken
    offsets: Rows
    references: tuple[Points, ...] | Box  # centres, or centres and extents
    output: ir.Value  # in the order of [N, Q, M*D]
    samplers: tuple[ir.Node, ...] = field(default=())

    @property
    def name(self) -> str:
        return self.output.name

    @property
    def num_points(self) -> int:
        """Points of a level as the op has them, where all levels have the same number."""
        return max(self.points)

    @property
    def form(self) -> str:
        """How much of the arithmetic the op takes over, for people."""
        locations = "absolute locations" if isinstance(self.references, Box) else "reference points and offsets"
        return f"{locations}, {'weights' if self.is_weights else 'logits'}"

    def structure(self) -> dict[str, object]:
        """Return what must not depend on the sizes of the inputs, by what a message calls it."""
        references, scale = self.references, self.offsets.scale
        return {
            "number of heads, channels or points": (self.heads, self.channels, self.points),
            "value": self.value.name,
            "reference points": references.box if isinstance(references, Box) else [
                (part.value.name, part.repeated, part.columns, part.first) for part in references
            ],
            "weights": (self.is_weights, _layout(self.logits)),
            "offsets": _layout(self.offsets),
            "scale of the offsets, which the exporter may have fixed for one size,": scale is None or scale.tolist(),
        }  # fmt: skip


def _layout(rows: Rows) -> tuple:
    return rows.value.name, rows.columns, rows.order.tolist()


@dataclass(frozen=True)
class Left:
    """GridSample nodes that stay, and why."""

    names: tuple[str, ...]
    why: str


def find(graph: ir.Graph, facts: Facts) -> tuple[list[Region], list[Left]]:
    """Return the deformable attentions of a graph, and what samples otherwise."""
    groups: dict[ir.Node, list[tuple[ir.Node, ir.Value]]] = {}
    left, regions = [], []
    for node in graph:
        if node.op_type != "GridSample":
            continue
        try:
            _check_sampler(node, facts)
            product, operand = _product(node.outputs[0])
            groups.setdefault(product, []).append((node, operand))
        except NotMatched as error:
            left.append(Left((node.name,), str(error)))
    for product, members in groups.items():
        samplers = [node for node, _ in members]
        try:
            regions.append(_Match(product, members[0][1], samplers, facts).region())
        except NotMatched as error:
            left.append(Left(tuple(node.name for node in samplers), str(error)))
    return regions, left


def _check_sampler(node: ir.Node, facts: Facts) -> None:
    shape = facts.shape(node.inputs[0])
    if shape is not None and len(shape) != 4:
        raise NotMatched(f"it samples maps of {len(shape) - 2} dimensions, and the op those of 2")
    wanted = {"mode": ("bilinear", "linear"), "padding_mode": ("zeros",), "align_corners": (0,)}
    given = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": 0}
    given |= {name: attribute.value for name, attribute in node.attributes.items()}
    for name, allowed in wanted.items():
        if given[name] not in allowed:
            raise NotMatched(f"its {name} is {given[name]!r}, and the op's {allowed[0]!r}")


def _product(value: ir.Value) -> tuple[ir.Node, ir.Value]:
    """Return the Mul that samples run into, and which of its operands they are."""
    for _ in range(REACH):
        users = [node for node, _ in value.uses() if node.op_type not in ("Shape", "Size")]
        if len(users) != 1:
            found = ", ".join(describe(node) for node in users) or "none"
            raise NotMatched(f"its samples have {len(users)} users, and one weighted sum is expected: {found}")
        (node,) = users
        if node.op_type == "Mul":
            return node, value
        if node.op_type not in MOVING:
            raise NotMatched(f"its samples go into {describe(node)}, and a product with weights is expected")
        value = node.outputs[0]
    raise NotMatched(f"no product with weights follows within {REACH} nodes")


class _Match:
    """The match of one region."""

    def __init__(self, product: ir.Node, samples: ir.Value, samplers: list[ir.Node], facts: Facts):
        self.product, self.samples, self.samplers, self.facts = product, samples, samplers, facts

    def region(self) -> Region:
        self._read_shapes()
        value = self._value()
        self.outputs = [node.outputs[0] for node in self.samplers]
        pairs = self._samples()
        logits, is_weights = self._logits(pairs)
        offsets, references = self._locations()
        return Region(
            self.batch, self.queries, self.heads, self.channels, self.points, self.sizes,
            tuple(node.inputs[0] for node in self.samplers), value, logits, is_weights, offsets, references,
            self._output(), tuple(self.samplers),
        )  # fmt: skip

    def _read_shapes(self) -> None:
        maps = [self.facts.shape(node.inputs[0]) for node in self.samplers]
        grids = [self.facts.shape(node.inputs[1]) for node in self.samplers]
        if None in maps or None in grids or 0 in itertools.chain(*maps, *grids):
            raise NotMatched("the sizes of its maps or grids are not known")
        self.rows, self.channels, self.queries = maps[0][0], maps[0][1], grids[0][1]
        if {(*shape[:2], grid[0], grid[1]) for shape, grid in zip(maps, grids)} != {
            (self.rows, self.channels, self.rows, self.queries)
        }:
            raise NotMatched(f"its levels have maps of {maps} and grids of {grids}, which differ in more than size")
        self._measure()

    def _measure(self) -> None:
        shapes = [self.facts.shape(node.inputs[0]) for node in self.samplers]
        self.sizes = tuple((shape[2], shape[3]) for shape in shapes)
        self.points = tuple(self.facts.shape(node.inputs[1])[2] for node in self.samplers)

    def _value(self) -> ir.Value:
        """Sort the levels, learn the number of heads, and return the value that all maps are cut from."""
        paths = []
        for node in self.samplers:
            shape = self.facts.shape(node.inputs[0])
            paths.append(walk(node.inputs[0], np.arange(math.prod(shape)), self.facts))
        valid = []
        for sources in _common(paths):
            starts = [int(source.flat[0]) for source in sources]
            order = sorted(range(len(starts)), key=starts.__getitem__)
            if self._is_value([sources[i] for i in order], [self.sizes[i] for i in order]):
                valid.append((sources[0].value, order))
        if not valid:
            raise NotMatched(_stopped("the value", [path[-1] for path in paths]))
        value, order = min(valid, key=lambda pair: len(self.facts.shape(pair[0])) != 3)
        self.samplers = [self.samplers[i] for i in order]
        self._measure()
        return value

    def _is_value(self, sources: list[Source], sizes: list[tuple[int, int]]) -> bool:
        if any(uniform(source.scale) != 1 or uniform(source.shift) != 0 for source in sources):
            return False
        places = [source.flat.reshape(self.rows, self.channels, -1) for source in sources]
        steps = {int(place[0, 0, 1] - place[0, 0, 0]) for place in places if place.shape[2] > 1}
        if len(steps) != 1:
            return False
        (width,) = steps  # M*D
        if width < self.channels or width % self.channels or self.rows % (width // self.channels):
            return False
        heads = width // self.channels
        batch, tokens = self.rows // heads, sum(height * wide for height, wide in sizes)
        if math.prod(self.facts.shape(sources[0].value)) != batch * tokens * width:
            return False
        n, m = np.divmod(np.arange(self.rows), heads)
        first = ((n * tokens * width + m * self.channels)[:, None] + np.arange(self.channels))[..., None]
        start = 0
        for place in places:
            if not np.array_equal(place, first + (start + np.arange(place.shape[2])) * width):
                return False
            start += place.shape[2]
        self.batch, self.heads = batch, heads
        return True

    def _samples(self) -> list[tuple[int, int]]:
        """Return which (level, point) every sample of the last axis is; the product must be of [N*M, D, Q, samples]."""
        shape = self.facts.shape(self.samples)
        if shape is None or shape != self.facts.shape(self.product.outputs[0]):
            raise NotMatched(f"{describe(self.product)} changes the shape of the samples")
        count = sum(self.points)
        sizes = (self.rows, self.channels, self.queries, count)
        if shape[-1] != count or math.prod(shape) != math.prod(sizes):
            raise NotMatched(
                f"{describe(self.product)} weighs samples of the shape {list(shape)}; {list(sizes)} is expected, or "
                "the same in other axes with all samples of a query in the last"
            )
        flat = _checked_places(sizes)
        level, place = self._trace(self.samples, flat)
        row, channel, query, sample = np.unravel_index(flat, sizes)
        first = (row == 0) & (channel == 0) & (query == 0)
        pairs = [(-1, -1)] * count
        for j, of, at in zip(sample[first], level[first], place[first]):
            pairs[j] = int(of), int(at)
        wanted = {(of, at) for of, points in enumerate(self.points) for at in range(points)}
        if set(pairs) != wanted:
            raise NotMatched(f"{describe(self.product)} does not weigh every sample of a query once")
        of, at = np.array(pairs).T
        expected = ((row * self.channels + channel) * self.queries + query) * np.array(self.points)[of[sample]]
        if not (np.array_equal(level, of[sample]) and np.array_equal(place, expected + at[sample])):
            raise NotMatched(f"the samples that {describe(self.product)} weighs are not in one order for all queries")
        return pairs

    def _trace(self, value: ir.Value, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which level's GridSample elements come from, and their places in its output."""
        for level, output in enumerate(self.outputs):
            if value is output:
                return np.full(flat.shape, level), flat
        node = value.producer()
        if node is None or node.op_type not in MOVING:
            raise NotMatched(f"besides samples, {describe(node)} is weighed")
        levels, places = np.full(flat.shape, -1), np.full(flat.shape, -1)
        for part, chosen, moved in pull(node, value, flat, self.facts):
            where = slice(None) if chosen is None else chosen
            levels[where], places[where] = self._trace(part, moved)
        if (levels < 0).any():
            raise NotMatched(f"the samples stop at {describe(node)}")
        return levels, places

    def _logits(self, pairs: list[tuple[int, int]]) -> tuple[Rows, bool]:
        others = [value for value in self.product.inputs if value is not self.samples]
        if len(others) != 1:
            raise NotMatched(f"{describe(self.product)} is a square, not a product with weights")
        (weights,) = others
        shape, narrow = self.facts.shape(self.product.outputs[0]), self.facts.shape(weights)
        if narrow is None:
            raise NotMatched("the shape of its weights is not known")
        sizes = (self.rows, self.channels, self.queries, len(pairs))
        row, query, sample = np.meshgrid(*(np.arange(sizes[i]) for i in (0, 2, 3)), indexing="ij", sparse=True)
        flat = ((row * self.channels) * self.queries + query) * sizes[3] + sample
        places = spread(flat.reshape(-1), shape, narrow)
        checked = _checked_places(sizes)
        at = np.unravel_index(checked, sizes)
        same = places.reshape(flat.shape)[at[0], at[2], at[3]]
        if not np.array_equal(spread(checked, shape, narrow), same):
            raise NotMatched("its weights differ between the channels of a head")
        path = walk(weights, places, self.facts)

        def rows(sources: list[Source]) -> list[Rows]:
            found = []
            for source in sources:
                if uniform(source.scale) != 1 or uniform(source.shift) != 0:
                    break
                place = source.flat.reshape(self.batch, self.heads, self.queries, -1, 1).transpose(0, 2, 1, 3, 4)
                inner = self._inner([place], math.prod(self.facts.shape(source.value)))
                if inner is None:
                    continue
                order = np.full((self.heads, len(self.points), max(self.points)), -1)
                for j, (level, point) in enumerate(pairs):
                    order[:, level, point] = inner[1][0][:, j, 0]
                found.append(Rows(source.value, inner[0], order))
            return found

        for source in path:
            node = source.value.producer()
            if node is not None and node.op_type == "Softmax" and self._spans(node, source.flat, len(pairs)):
                before = walk(node.inputs[0], source.flat, self.facts)
                if found := rows(before):
                    return min(found, key=self._cost), False
        if found := rows(path):
            return min(found, key=self._cost), True
        raise NotMatched(_stopped("the weights", [path[-1]]))

    def _spans(self, node: ir.Node, flat: np.ndarray, count: int) -> bool:
        """Whether the softmax is over the samples of one query and head, and over no more."""
        shape = self.facts.shape(node.outputs[0])
        version = node.graph.opset_imports.get("", 13) if node.graph is not None else 13
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1 if version >= 13 else 1
        if axis % len(shape) != len(shape) - 1 or shape[-1] != count:
            return False
        groups = np.sort(flat.reshape(-1, self.queries, count), axis=-1)
        return bool((groups[..., 0] % count == 0).all() and (groups == groups[..., :1] + np.arange(count)).all())

    def _inner(self, places: Sequence[np.ndarray], size: int) -> tuple[int, list[np.ndarray]] | None:
        """Of places [N, Q, M, P, C] of every level in a value of that size: its columns, and the places in a row."""
        columns, rest = divmod(size, self.batch * self.queries)
        if rest:
            return None
        base = (np.arange(self.batch * self.queries) * columns).reshape(self.batch, self.queries, 1, 1, 1)
        inner = [place[0, 0] for place in places]
        for place, within in zip(places, inner):
            if within.min() < 0 or within.max() >= columns or not np.array_equal(place, base + within):
                return None
        return columns, inner

    def _cost(self, rows: Rows) -> tuple:
        rank = len(self.facts.shape(rows.value))
        return rows.scale is not None, not rows.is_whole, rank != 3

    def _locations(self) -> tuple[Rows, tuple[Points, ...] | Box]:
        paths = []
        for node in self.samplers:
            shape = self.facts.shape(node.inputs[1])
            paths.append(walk(node.inputs[1], np.arange(math.prod(shape)), self.facts))
        ends = [path[-1] for path in paths]
        is_sum = all(
            end.value.producer() is not None and end.value.producer().op_type == "Add"
            and _is(end.scale, 2) and _is(end.shift, -1) for end in ends
        )  # fmt: skip
        if is_sum:
            branches = [self._branches(end) for end in ends]
            for r, o in ((0, 1), (1, 0)):
                found = self._relative([branch[r] for branch in branches], [branch[o] for branch in branches])
                if found:
                    return found
        found = []
        for sources in _common(paths):
            scales, shifts = ([uniform(getattr(s, name)) for s in sources] for name in ("scale", "shift"))
            if None in scales + shifts or max(scales) != min(scales) or max(shifts) != min(shifts):
                continue
            if rows := self._offsets(sources, None):
                # The grid spans -1 to 1; the op takes reference + offset / P * extent / 2.
                centre, extent = (shifts[0] + 1) / 2, scales[0] * max(self.points)
                found.append((rows, Box((centre, centre, extent, extent))))
        if found:
            return min(found, key=lambda pair: self._cost(pair[0]))
        raise NotMatched(_stopped("the sampling locations", ends))

    def _branches(self, at: Source) -> list[list[Source]]:
        """Return the walks from both operands of the sum or product that makes the value of `at`."""
        node, shape = at.value.producer(), self.facts.shape(at.value)
        return [walk(value, spread(at.flat, shape, self.facts.shape(value)), self.facts) for value in node.inputs]

    def _relative(self, references: list[list[Source]], offsets: list[list[Source]]):
        """Return offsets and reference points where locations are references + offsets * scale (* extents)."""
        centre = next((found for s in _common(references) if (found := self._points(s))), None)
        if centre is None:
            return None
        sizes = [np.array(size[::-1], np.float64) for size in self.sizes]  # (width, height)
        ends = [path[-1] for path in offsets]
        makers = [end.value.producer() for end in ends]
        if all(node is not None and node.op_type == "Mul" for node in makers):  # with the extents of boxes
            branches = [self._branches(end) for end in ends]
            for e, o in ((0, 1), (1, 0)):
                extents = next((found for s in _common([b[e] for b in branches]) if (found := self._points(s))), None)
                if extents is None:
                    continue
                scaled = [[s._replace(scale=s.scale * end.scale) for s in b[o]] for b, end in zip(branches, ends)]
                if rows := self._best_offsets(scaled, [np.full(2, 2.0 * max(self.points))] * len(ends)):
                    return rows, (centre, extents)
        rows = self._best_offsets(offsets, sizes)
        return rows and (rows, (centre,))

    def _best_offsets(self, paths: list[list[Source]], units: list[np.ndarray]) -> Rows | None:
        found = [rows for sources in _common(paths) if (rows := self._offsets(sources, units))]
        return min(found, key=self._cost, default=None)

    def _offsets(self, sources: list[Source], units: list[np.ndarray] | None) -> Rows | None:
        """Return offsets, of which one is 1 / units of the map; units: of every level, for x and y; None: any."""
        if units is not None and any(not _is(source.shift, 0) for source in sources):
            return None
        inner = self._inner([self._by_query(s.flat, i) for i, s in enumerate(sources)],
                            math.prod(self.facts.shape(sources[0].value)))  # fmt: skip
        if inner is None:
            return None
        order = np.full((self.heads, len(self.points), max(self.points), 2), -1)
        scale = np.ones(order.shape)
        for level, (source, within) in enumerate(zip(sources, inner[1])):
            points = self.points[level]
            order[:, level, :points] = within
            if units is None:
                continue
            factors = self._by_query(np.broadcast_to(source.scale, source.flat.shape), level) * units[level]
            if np.abs(factors - factors[0, 0]).max() > UNIFORM * np.abs(factors).max():
                return None
            scale[:, level, :points] = factors[0, 0]
        is_one = np.abs(scale - 1).max() < UNIFORM
        return Rows(sources[0].value, inner[0], order, None if is_one else scale)

    def _by_query(self, array: np.ndarray, level: int) -> np.ndarray:
        """What belongs to a grid, as [N, Q, M, P, 2]."""
        shape = self.batch, self.heads, self.queries, self.points[level], 2
        return array.reshape(shape).transpose(0, 2, 1, 3, 4)

    def _points(self, sources: list[Source]) -> Points | None:
        if any(not _is(source.scale, 1) or not _is(source.shift, 0) for source in sources):
            return None
        levels = []
        for level, source in enumerate(sources):
            places = self._by_query(source.flat, level)
            if (places != places[:, :, :1, :1]).any():
                return None
            levels.append(places[:, :, 0, 0])
        places = np.stack(levels, 2)  # [N, Q, L, 2]
        size, counts = math.prod(self.facts.shape(sources[0].value)), places.shape[:3]
        # A step of 0 along an axis: its elements share what they read.
        steps = [
            int(np.take(places, 1, i).flat[0] - places.flat[0]) if count > 1 else 0 for i, count in enumerate(counts)
        ]
        read = [count if step else 1 for count, step in zip(counts, steps)]
        columns, rest = divmod(size, math.prod(read))
        first = int(places.flat[0])
        if rest or first + 2 > columns:
            return None
        wanted = first + np.arange(2)
        for i in range(3):
            step = columns * math.prod(read[i + 1 :]) if read[i] > 1 else 0
            wanted = wanted + (np.arange(counts[i]) * step).reshape([-1 if j == i else 1 for j in range(4)])
        if not np.array_equal(places, np.broadcast_to(wanted, places.shape)):
            return None
        batch, queries, level = (step == 0 and count > 1 for step, count in zip(steps, counts))
        return Points(sources[0].value, (batch, queries, level), columns, first)

    def _output(self) -> ir.Value:
        """Return the value behind the weighted sum that has the elements of [N, Q, M*D] in this order."""
        value = self.product.outputs[0]
        node = self._only_user(value)
        while node.op_type in ("Cast", "Identity"):
            value = node.outputs[0]
            node = self._only_user(value)
        axes = self._axes(node)
        if node.op_type != "ReduceSum" or axes is None or axes != [len(self.facts.shape(value)) - 1]:
            raise NotMatched(f"the weighted samples go into {describe(node)}, and a sum over them is expected")
        total = node.outputs[0]
        counts = self.batch, self.queries, self.heads, self.channels
        sums = np.arange(math.prod(counts)).reshape(self.batch, self.heads, self.channels, self.queries)
        wanted = sums.transpose(0, 3, 1, 2).reshape(-1)
        found, value = [], total
        for _ in range(REACH):
            path = walk(value, np.arange(wanted.size), self.facts)
            at = next((source for source in path if source.value is total), None)
            if at is not None and np.array_equal(at.flat, wanted):
                found.append(value)
            users = [node for node, _ in value.uses() if node.op_type not in ("Shape", "Size")]
            if len(users) != 1 or users[0].op_type not in MOVING - {"Concat", "Split"}:
                break
            value = users[0].outputs[0]
        if not found:
            raise NotMatched(f"behind {describe(node)}, no value has the order [N, Q, M*D]")
        return next((value for value in found if len(self.facts.shape(value)) == 3), found[0])

    def _only_user(self, value: ir.Value) -> ir.Node:
        users = [node for node, _ in value.uses() if node.op_type not in ("Shape", "Size")]
        if len(users) != 1:
            raise NotMatched(f"{value.name} has {len(users)} users, and one is expected")
        return users[0]

    def _axes(self, node: ir.Node) -> list[int] | None:
        rank = len(self.facts.shape(node.inputs[0]) or ())
        if "axes" in node.attributes:
            axes = node.attributes["axes"].as_ints()
        else:
            given = self.facts.known(node.inputs[1]) if len(node.inputs) > 1 else None
            if given is None:
                return None
            axes = given.reshape(-1).tolist()
        return [axis % rank for axis in axes]


def _common(paths: Sequence[list[Source]]) -> Iterator[list[Source]]:
    """Yield, for every value that all paths pass, their sources in it; those nearest to the start of the first come
    first."""
    others = [{source.value: source for source in path} for path in paths[1:]]
    for source in paths[0]:
        if all(source.value in other for other in others):
            yield [source, *(other[source.value] for other in others)]


def _is(factor: np.ndarray | float, number: float) -> bool:
    found = uniform(factor)
    return found is not None and abs(found - number) <= UNIFORM


def _stopped(what: str, ends: Sequence[Source]) -> str:
    nodes = list(dict.fromkeys(describe(end.value.producer()) for end in ends))
    return f"{what} cannot be followed beyond {' and '.join(nodes[:2])}, and up to there nothing has the op's order"


def _checked_places(sizes: tuple[int, int, int, int]) -> np.ndarray:
    """Return flat indices of [N*M, D, Q, samples]: all, or where there are more than MOST, every place of each axis and
    MOST combinations."""
    total = math.prod(sizes)
    if total <= MOST:
        return np.arange(total)
    random = np.random.default_rng(0)
    kept = max(2, MOST // (total // sizes[2]))  # queries, of which there are many
    queries = np.unique(np.r_[0, sizes[2] - 1, random.integers(0, sizes[2], kept)])
    grid = np.ravel_multi_index(np.ix_(np.arange(sizes[0]), np.arange(sizes[1]), queries, np.arange(sizes[3])), sizes)
    every = [random.integers(0, size, sizes[2]) for size in sizes]
    every[2] = np.arange(sizes[2])
    return np.concatenate([grid.reshape(-1), np.ravel_multi_index(every, sizes)])
