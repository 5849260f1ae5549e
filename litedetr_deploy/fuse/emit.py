"""A matched region written as nodes: the op, or its lowering to standard operators, and what brings its inputs into
the op's form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ..ops import lowering, schema
from .facts import Facts
from .match import PADDED_LOGIT, Box, NotMatched, Points, Region, Rows

WRONG = 1.01  # times offsets or logits, in a negative control


@dataclass(frozen=True)
class Sizes:
    """Sizes of a region that are the same for all inputs; None where they are not."""

    batch: int | None
    queries: int | None
    tokens: int | None
    maps: tuple[tuple[int, int], ...] | None

    @classmethod
    def of(cls, region: Region, other: Region | None) -> Sizes:
        """Return what two matches of one region, for inputs of different sizes, have in common."""

        def common(number: Callable):
            return number(region) if other is None or number(region) == number(other) else None

        return cls(
            common(lambda r: r.batch), common(lambda r: r.queries),
            common(lambda r: sum(height * width for height, width in r.sizes)), common(lambda r: r.sizes),
        )  # fmt: skip


@dataclass
class Written:
    """Nodes and constants that compute a region; inputs: of the op, by name."""

    nodes: list[ir.Node]
    constants: list[ir.Value]
    inputs: dict[str, ir.Value]
    output: ir.Value


def sources(region: Region, sizes: Sizes) -> list[str]:
    """Return the names of the graph's values that the written region reads."""
    parts = () if isinstance(region.references, Box) else region.references
    values = [region.value, region.logits.value, region.offsets.value, *(part.value for part in parts)]
    if sizes.maps is None:
        values += [_map_size(value) for value in region.maps]
    return list(dict.fromkeys(value.name for value in values))


def _map_size(value: ir.Value) -> ir.Value:
    """Return the target of the Reshape that makes a map [N*M, D, H, W], which ends in H and W."""
    node = value.producer()
    while node is not None and node.op_type in ("Cast", "Identity"):
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Reshape":
        made = "an input" if node is None else f"{node.op_type} {node.name!r}"
        raise NotMatched(
            f"the sizes of its maps depend on the input's, and {made} makes them, from which they cannot be read"
        )
    return node.inputs[1]


def write(
    region: Region, sizes: Sizes, facts: Facts, kinds: Mapping[str, ir.DataType], attention: str,
    value_of: Callable[[str], ir.Value], spoilt: str = "",
) -> Written:  # fmt: skip
    """Write a region.

    Args:
        facts: of the inputs that `region` was matched for.
        kinds: element types of `sources`, and of the region's output.
        attention: 'op' or 'gather'.
        value_of: gives the value of a name in the graph that is written.
        spoilt: 'offsets' or 'logits', which are then wrong by 1 %.
    """
    return _Writer(region, sizes, facts, kinds, value_of, spoilt).write(attention)


@dataclass
class _Writer:
    region: Region
    sizes: Sizes
    facts: Facts
    kinds: Mapping[str, ir.DataType]
    value_of: Callable[[str], ir.Value]
    spoilt: str
    nodes: list[ir.Node] = field(default_factory=list)
    constants: list[ir.Value] = field(default_factory=list)

    def write(self, attention: str) -> Written:
        region = self.region
        kind = self.kinds[region.value.name]
        width = region.heads * region.channels
        value = self._rows(region.value, width, self.tokens, self.sizes.tokens)
        logits = self._logits(kind)
        offsets, offset_kind = self._part(region.offsets), self.kinds[region.offsets.value.name]
        scale = region.offsets.scale
        # A scale such as 2/3 is not the same number in half.
        if offset_kind not in (kind, ir.DataType.FLOAT) or (scale is not None and offset_kind != ir.DataType.FLOAT):
            offsets, offset_kind = self.op("Cast", offsets, to=ir.DataType.FLOAT), ir.DataType.FLOAT
        if scale is not None:
            offsets = self.op("Mul", offsets, self.constant(scale.reshape(-1).astype(np.float32)))
        if self.spoilt == "offsets":
            offsets = self.op("Mul", offsets, self.number(WRONG, offset_kind))
        references = self._references(offsets)
        shapes = self._spatial_shapes()
        inputs = (logits, value, references, offsets, shapes)
        names = [name for name, _, _ in schema.INPUTS[schema.PLAIN]]
        if attention == "op":
            output = self.op(
                schema.PLAIN, *inputs, domain=schema.DOMAIN, num_heads=region.heads, num_points=region.num_points,
                **schema.PLUGIN_ATTRIBUTES,
            )  # fmt: skip
        else:
            output = self._lowered(inputs, (kind, kind, ir.DataType.FLOAT, offset_kind, ir.DataType.INT64))
        if (wanted := self.kinds[region.output.name]) != kind:
            output = self.op("Cast", output, to=wanted)
        shape = self.facts.shape(region.output)
        if shape != (region.batch, region.queries, width):
            dynamic = None in (self.sizes.batch, self.sizes.queries)
            if dynamic and shape[:2] != (region.batch, region.queries):
                raise NotMatched(
                    f"its output {region.name!r}, {list(shape)}, has batch or queries, which are dynamic, in one axis"
                )
            target = (0, 0, *shape[2:]) if dynamic else shape
            output = self.op("Reshape", output, self.ints(*target))
        return Written(self.nodes, self.constants, dict(zip(names, inputs)), output)

    @property
    def tokens(self) -> int:
        return sum(height * width for height, width in self.region.sizes)

    def op(self, op_type: str, *inputs: ir.Value, domain: str = "", **attributes) -> ir.Value:
        node = ir.node(op_type, inputs, attributes or None, domain=domain)
        node.name = f"{self.region.name}/litedetr/{op_type}_{len(self.nodes)}"
        node.outputs[0].name = f"{node.name}:0"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: np.ndarray, kind: ir.DataType | None = None) -> ir.Value:
        name = f"{self.region.name}/litedetr/constant_{len(self.constants)}"
        tensor = ir.tensor(array, kind, name) if kind is not None else ir.tensor(array, name=name)
        value = ir.val(name, const_value=tensor)
        self.constants.append(value)
        return value

    def ints(self, *numbers: int) -> ir.Value:
        return self.constant(np.array(numbers, np.int64))

    def number(self, number: float, kind: ir.DataType) -> ir.Value:
        return self.constant(np.full(1, number, np.float32).astype(kind.numpy()), kind)

    def _rows(self, value: ir.Value, columns: int, count: int, fixed: int | None) -> ir.Value:
        """Return a value as [N, count, columns]; fixed: the count where it is the same for all inputs."""
        shape, here = self.facts.shape(value), self.value_of(value.name)
        if shape == (self.region.batch, count, columns):
            return here
        if shape[:2] == (self.region.batch, count):
            target = 0, 0, columns
        elif fixed is not None:
            target = -1, fixed, columns
        elif self.sizes.batch is not None:
            target = self.sizes.batch, -1, columns
        else:
            raise NotMatched(f"batch and tokens are both dynamic and one axis of {value.name!r}, {list(shape)}")
        return self.op("Reshape", here, self.ints(*target))

    def _part(self, rows: Rows) -> ir.Value:
        value = self._rows(rows.value, rows.columns, self.region.queries, self.sizes.queries)
        if not rows.is_whole:
            value = self.op(
                "Gather", value, self.constant(np.maximum(rows.order.reshape(-1), 0).astype(np.int64)), axis=2
            )
        return value

    def _logits(self, kind: ir.DataType) -> ir.Value:
        rows = self.region.logits
        own = self.kinds[rows.value.name]
        value = self._part(rows)
        if self.region.is_weights:
            smallest = np.finfo(np.float16 if own == ir.DataType.FLOAT16 else np.float32).tiny
            value = self.op("Log", self.op("Max", value, self.number(float(smallest), own)))
        if self.spoilt == "logits":
            value = self.op("Mul", value, self.number(WRONG, own))
        missing = rows.order.reshape(-1) < 0
        if missing.any():
            padding = np.where(missing, np.float32(PADDED_LOGIT), np.float32(0)).astype(own.numpy())
            value = self.op("Add", value, self.constant(padding, own))
        return value if own == kind else self.op("Cast", value, to=kind)

    def _references(self, offsets: ir.Value) -> ir.Value:
        """Return the reference points, [N, Q, L, 2 or 4] in float32."""
        parts = self.region.references
        if isinstance(parts, Box):
            box = self.constant(np.array(parts.box, np.float32).reshape(1, 1, 1, 4))
            return self.op("Expand", box, self._counts(offsets, (True, True, True)))
        first, last = parts[0], parts[-1]
        if (
            first is not last
            and (first.value, first.repeated, first.columns) == (last.value, last.repeated, last.columns)
            and first.columns == 4
            and (first.first, last.first) == (0, 2)
        ):
            return self._points(first, 4, offsets)
        pieces = [self._points(part, 2, offsets) for part in parts]
        return pieces[0] if len(pieces) == 1 else self.op("Concat", *pieces, axis=3)

    def _points(self, part: Points, columns: int, offsets: ir.Value) -> ir.Value:
        counts = self.region.batch, self.region.queries, len(self.region.points)
        fixed = self.sizes.batch, self.sizes.queries, len(self.region.points)
        shape, value = self.facts.shape(part.value), self.value_of(part.value.name)
        read = tuple(1 if repeated else count for repeated, count in zip(part.repeated, counts))
        if shape != (*read, part.columns):
            target = [1 if repeated else size for repeated, size in zip(part.repeated, fixed)]
            if target.count(None) > 1:
                if shape[:2] != read[:2]:
                    raise NotMatched(
                        f"batch and queries are both dynamic and one axis of {part.value.name!r}, {list(shape)}"
                    )
                target[:2] = 0, 0
            value = self.op(
                "Reshape", value, self.ints(*(-1 if size is None else size for size in target), part.columns)
            )
        if self.kinds[part.value.name] != ir.DataType.FLOAT:
            value = self.op("Cast", value, to=ir.DataType.FLOAT)
        if part.columns != columns:
            value = self.op("Slice", value, self.ints(part.first), self.ints(part.first + columns), self.ints(3))
        if any(part.repeated):
            value = self.op("Expand", value, self._counts(offsets, part.repeated))
        return value

    def _counts(self, offsets: ir.Value, wanted: tuple[bool, bool, bool]) -> ir.Value:
        """Return a shape [N, Q, L, 1] with 1 for what is not wanted."""
        fixed = self.sizes.batch, self.sizes.queries, len(self.region.points)
        sizes = [size if want else 1 for want, size in zip(wanted, fixed)]
        if None not in sizes:
            return self.ints(*sizes, 1)
        shape = self.op("Shape", offsets)
        pieces = [
            self.op("Slice", shape, self.ints(i), self.ints(i + 1), self.ints(0)) if size is None else self.ints(size)
            for i, size in enumerate(sizes)
        ]
        return self.op("Concat", *pieces, self.ints(1), axis=0)

    def _spatial_shapes(self) -> ir.Value:
        if self.sizes.maps is not None:
            return self.constant(np.array(self.sizes.maps, np.int64))
        pieces = []
        for value, size in zip(self.region.maps, self.region.sizes):
            target = _map_size(value)
            content = self.facts.known(target)
            if content is None or content.reshape(-1).tolist()[-2:] != list(size):
                raise NotMatched(f"the sizes of its maps depend on the input's, and {target.name!r} does not hold them")
            pieces.append(self.op("Slice", self.value_of(target.name), self.ints(2), self.ints(4), self.ints(0)))
        joined = pieces[0] if len(pieces) == 1 else self.op("Concat", *pieces, axis=0)
        return self.op("Reshape", joined, self.ints(len(pieces), 2))

    def _lowered(self, inputs: tuple[ir.Value, ...], kinds: tuple[ir.DataType, ...]) -> ir.Value:
        """Write the op in standard operators, as `ops.lowering` traces them; kinds: types of the inputs."""
        from onnxscript import evaluator

        region, levels = self.region, len(self.region.points)
        samples = region.heads * levels * region.num_points
        ranks = 2 if not isinstance(region.references, Box) and len(region.references) == 1 else 4
        queries = self.sizes.batch, self.sizes.queries
        tokens = self.sizes.batch, self.sizes.tokens, region.heads * region.channels
        shapes = (*queries, samples), tokens, (*queries, levels, ranks), (*queries, samples * 2), (levels, 2)
        typed = map(_Typed, inputs, kinds, shapes)
        with evaluator.default_as(_Recorder(self)):
            return lowering.gather(schema.PLAIN, (*typed, None), region.heads, region.num_points)


class _Typed(NamedTuple):
    """A value of the graph, and what a traced function asks of it; the graph's own notes stay as they are."""

    value: ir.Value
    dtype: ir.DataType
    shape: tuple[int | None, ...]


class _Recorder:
    """What onnxscript calls for every operator of a traced function: writes it as a node."""

    def __init__(self, writer: _Writer):
        self._writer = writer

    def eval(self, operator, inputs, attributes):
        values = [value.value if isinstance(value, _Typed) else value for value in inputs]
        return self._writer.op(operator.name, *values, **attributes)
