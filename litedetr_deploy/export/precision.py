"""A finished FP32 graph made strongly typed: half storage where it is safe, FP32 islands elsewhere.

Every node gets one type, FP32 or half (float16 or bfloat16), for all its float inputs and outputs; the attention op's
reference points alone stay FP32.  So ONNX's inference and TensorRT's strongly typed networks agree on every value.

Half are convolutions, matrix products with their bias, sums, GELU, and the attention op (storage; it computes in FP32).
Nodes that only move or pick values follow their inputs.  Everything else is FP32, as are the ISLANDS and the products
of queries and keys in front of a softmax.  Where half's range (65504) could break:
- LayerNorm and GroupNorm square what they read: half would overflow from 256 on.
- The sum in front of a LayerNorm is the stream that residuals pile up on: it is FP32 throughout, and only the branch
  that is added comes in half, so that a graph overflows only where a single product leaves the range.
- Residual sums of a ResNet are half: no norm follows them, as batch norm is folded into the convolutions.
- A constant too large for half keeps the nodes that read it in FP32.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from ..errors import LiteDetrError
from ..ops import schema
from .graph import constant

FLOAT = ir.DataType.FLOAT
# What is half in each precision.  'int8' is for a graph that `quantize` has been over.
HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16, "int8": ir.DataType.FLOAT16}

# Kept in FP32.  Patterns of the names of nodes or of the modules that they come from (see graph.finish), as a shell
# writes them; the name of a module stands for all that is in it.
ISLANDS = (
    "deployed",  # pixels' normalisation, post-processing
    "detector/*",  # masks, positions, reference points, proposals, top-k
    "detector.input_proj.*.1",  # group normalisation
    "detector.enc_output",  # query selection: scores and boxes of the tokens
    "detector.enc_out_class_embed",
    "detector.enc_out_bbox_embed",
    "detector.pos_trans",  # position and content of Deformable DETR's queries
    "detector.reference_points",  # of its one-stage model
    "detector.decoder/*",  # reference boxes, their encoding, inverse sigmoid, refinement
    "detector.class_embed",  # heads
    "detector.bbox_embed",
    f"*/{schema.KEY_AWARE}/*",  # the attention op in standard ops: coordinates, bilinear weights, softmax
    f"*/{schema.PLAIN}/*",
)

_POINTWISE = {"Add", "Div", "Erf", "Mul"}
_HALF_OPS = {"Conv", "Gemm", "MatMul", schema.KEY_AWARE, schema.PLAIN} | _POINTWISE
# Exact in either type: they take their inputs', so that no cast stands between a node and its data.
_FOLLOWERS = {
    "Concat", "DequantizeLinear", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "QuantizeLinear", "ReduceMax",
    "Pad", "ReduceMin", "Relu", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Tile", "TopK", "Transpose",
    "Unsqueeze", "Where",
}  # fmt: skip
# The two products of the attention op in standard ops work on the gathered samples, which are its largest tensor:
# they stay half, and the products of query and key become FP32 before they are summed to logits.
_SAMPLE_PRODUCT = re.compile(rf".*/(?:{schema.KEY_AWARE}|{schema.PLAIN})/MatMul(?:_\d+)?")


def apply(model: ir.Model, precision: str, keep: Sequence[str] = ()) -> None:
    """Type `model`, whose floats are all FP32, in place, for a key of HALVES; the graph's inputs and outputs stay FP32.
    keep: patterns like those of ISLANDS, of further nodes to keep in FP32; LiteDetrError for one that fits no node."""
    if precision != "int8":
        refuse_typed(model.graph)
    half = HALVES[precision]
    types = _node_types(model.graph, half, keep)
    for node in model.graph:
        for output in node.outputs:
            if output.dtype == FLOAT and node in types:
                output.type = ir.TensorType(types[node])
    _insert_casts(model.graph, types)


def refuse_typed(graph: ir.Graph) -> None:
    """Raise LiteDetrError for a graph that has half or quantized values."""
    values = [*graph.initializers.values(), *(output for node in graph for output in node.outputs)]
    typed = {value.dtype for value in values} & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT8}
    if typed:
        raise LiteDetrError(
            f"the graph is typed already: it has values of type {' and '.join(sorted(t.name for t in typed))}. Types "
            "are given to an FP32 graph: start from the checkpoint, or from a model exported with precision 'fp32'."
        )


def matching(graph: ir.Graph, patterns: Iterable[str]) -> set[ir.Node]:
    """Return the nodes that one of the patterns, written like those of ISLANDS, names."""
    whole = [pattern for name in patterns for pattern in (name, f"{name}[./]*")]
    return {node for node in graph if any(fnmatchcase(node.name, pattern) for pattern in whole)}


def count(model: ir.Model) -> dict[str, int]:
    """Return how many nodes compute in half, in FP32 and in INT8 (all of whose data comes out of DequantizeLinear, as
    rows or as it is), and how many casts there are between the first two."""
    counts = {"half": 0, "float": 0, "int8": 0, "casts": 0}
    for node in model.graph:
        values = _floats((*node.inputs, *node.outputs))
        if node.op_type == "Cast" and len(values) == 2:
            counts["casts"] += 1
        elif node.op_type not in ("QuantizeLinear", "DequantizeLinear") and values and node.outputs[0] in values:
            makers = [value.producer() for value in node.inputs[:2] if value is not None]
            makers = [node.inputs[0].producer() if node and node.op_type == "Reshape" else node for node in makers]
            is_int8 = len(makers) == 2 and all(maker and maker.op_type == "DequantizeLinear" for maker in makers)
            counts["int8" if is_int8 else "float" if node.outputs[0].dtype == FLOAT else "half"] += 1
    return counts


def _node_types(graph: ir.Graph, half: ir.DataType, keep: Sequence[str]) -> dict[ir.Node, ir.DataType]:
    """The type of every node that reads or makes floats."""
    islands = _in_float(graph, keep)
    types: dict[ir.Node, ir.DataType] = {}

    def given(node):
        """Types of the float inputs that a node computed."""
        return {types.get(v.producer(), FLOAT) for v in _floats(node.inputs) if not v.is_initializer()} - {None}

    for node in graph:
        if node.op_type in _FOLLOWERS:
            # Those that have constants alone wait for what their readers want.
            types[node] = FLOAT if FLOAT in given(node) else half if given(node) else None
        elif _floats((*node.inputs, *node.outputs)):
            is_sample_product = _SAMPLE_PRODUCT.fullmatch(node.name) and half in given(node)
            is_half = is_sample_product or (node.op_type in _HALF_OPS and node not in islands)
            types[node] = half if is_half else FLOAT
        if types.get(node) == half and any(_overflows(value, half) for value in _floats(node.inputs)):
            types[node] = FLOAT

    # What is read in FP32 alone becomes FP32, where that needs no cast more.
    for node in reversed(graph):
        movable = node.op_type in _FOLLOWERS or (node.op_type in _POINTWISE and given(node) == {FLOAT})
        if movable and node in types and types[node] != FLOAT:
            outputs = _floats(node.outputs)
            wanted = {_wanted(types, user, i) for output in outputs for user, i in output.uses()}
            if any(output.is_graph_output() for output in outputs):
                wanted.add(FLOAT)
            if wanted == {FLOAT} or types[node] is None:
                types[node] = half if wanted == {half} else FLOAT
    return types


def _wanted(types: dict[ir.Node, ir.DataType], node: ir.Node, index: int) -> ir.DataType:
    """The type in which a node reads its float input number `index`."""
    if node.domain == schema.DOMAIN and schema.INPUTS[node.op_type][index][1] == "F":
        return FLOAT
    return types[node]


def _in_float(graph: ir.Graph, keep: Sequence[str]) -> set[ir.Node]:
    """The nodes of the islands, and those that the data flow puts beside them."""
    for pattern in keep:
        if not matching(graph, [pattern]):
            raise LiteDetrError(
                f"the pattern {pattern!r} of what to keep in FP32 fits no node of the graph. Give names of modules "
                "such as 'detector.encoder.layers.0' or of nodes such as '*.linear2/MatMul', as the exported graph "
                "has them."
            )
    nodes = matching(graph, (*ISLANDS, *keep))
    for node in graph:
        if node.op_type == "LayerNormalization":
            nodes.update(_makers(node.inputs[0], {"Add"}))
        elif node.op_type == "Softmax":
            nodes.update(_scores(node.inputs[0]))
    return nodes


def _scores(logits: ir.Value) -> set[ir.Node]:
    """The product of scaled queries and keys in front of a softmax, and what is added to it."""
    nodes = set()
    for node in _makers(logits, {"Add", "MatMul"}):
        if node.op_type == "Add":
            nodes |= {node}.union(*map(_scores, node.inputs))
        elif not any(value.is_initializer() for value in node.inputs):
            nodes |= {node}.union(*(_makers(value, {"Mul"}) for value in node.inputs))
    return nodes


def _makers(value: ir.Value, op_types: Collection[str]) -> set[ir.Node]:
    """The nodes of these types that made `value`, or what was then only moved."""
    node = value.producer()
    if node is None or node.op_type in op_types:
        return {node} - {None}
    return set().union(*(_makers(v, op_types) for v in _floats(node.inputs))) if node.op_type in _FOLLOWERS else set()


def _insert_casts(graph: ir.Graph, types: dict[ir.Node, ir.DataType]) -> None:
    """One cast for each value that is read in another type, however many nodes read it; constants are stored in the
    types in which they are read."""
    converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(graph):
        for i, value in enumerate(node.inputs):
            if not _floats([value]) or value.dtype == (wanted := _wanted(types, node, i)):
                continue
            if (value, wanted) not in converted:
                converted[value, wanted] = _convert(graph, value, wanted)
            node.replace_input_with(i, converted[value, wanted])
    for (value, _), other in converted.items():
        if value.is_initializer() and not value.uses():
            graph.initializers.pop(value.name)
            other.name = value.name


def _convert(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """A value in another type: of a constant another constant, else the output of a cast behind its producer."""
    name = f"{value.name}.{dtype.name.lower()}"
    if value.is_initializer():
        return constant(graph, name, value.const_value.numpy().astype(dtype.numpy()), dtype)
    producer, result = value.producer(), ir.val(name, dtype, value.shape)
    cast_name = f"{producer.name if producer else value.name}/Cast"
    cast = ir.node("Cast", [value], {"to": int(dtype)}, outputs=[result], name=cast_name)
    if producer is None:
        graph.insert_before(graph[0], cast)
    else:
        graph.insert_after(producer, cast)
    return result


def _floats(values: Iterable[ir.Value | None]) -> list[ir.Value]:
    kinds = (FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return [value for value in values if value is not None and value.dtype in kinds]


def _overflows(value: ir.Value, half: ir.DataType) -> bool:
    largest = float(np.abs(value.const_value.numpy()).max(initial=0)) if value.is_initializer() else 0.0
    return np.isfinite(largest) and largest > float(half.max)
