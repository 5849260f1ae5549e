"""A finished FP32 graph made strongly typed: half storage where it is safe, FP32 islands elsewhere.

Every node gets one type, FP32 or half (float16 or bfloat16), and all its float inputs and outputs have that type; the
attention op's reference points alone stay FP32 whatever its type is.  A network that takes the types of the file as
law (TensorRT's strongly typed networks) and ONNX's own inference agree on every value.

What is half: convolutions, matrix products with their bias, sums, GELU, and the attention op (storage; it computes in
FP32 inside).  Nodes that only move or pick values follow their inputs.  Everything else is FP32, and so are the ISLANDS
and the products of queries and keys in front of a softmax.

Where half's range (65504) could break:
- LayerNorm and GroupNorm square what they read: half would overflow from 256 on.
- The sum in front of a LayerNorm is the stream that residuals pile up on.  It is FP32 throughout, and only the branch
  that is added to it comes in half, so that a graph overflows only where a single product leaves the range.
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
    """Type `model`, whose floats are all FP32, in place.  Inputs and outputs of the graph stay FP32.

    precision: a key of HALVES.
    keep: patterns like those of ISLANDS, of nodes to keep in FP32 beyond them.

    Raises LiteDetrError for a graph that is typed already and for a pattern that fits no node.
    """
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
    """Return how many nodes compute in half, in FP32 and in INT8 (all of whose data comes out of DequantizeLinear), and
    how many casts there are between the first two."""
    counts = {"half": 0, "float": 0, "int8": 0, "casts": 0}
    for node in model.graph:
        values = [value for value in (*node.inputs, *node.outputs) if value is not None and _is_float(value)]
        if node.op_type == "Cast" and len(values) == 2:
            counts["casts"] += 1
        elif node.op_type not in ("QuantizeLinear", "DequantizeLinear") and values and node.outputs[0] in values:
            if len(node.inputs) > 1 and all(map(_is_dequantized, node.inputs[:2])):
                counts["int8"] += 1
            else:
                counts["float" if node.outputs[0].dtype == FLOAT else "half"] += 1
    return counts


def _node_types(graph: ir.Graph, half: ir.DataType, keep: Sequence[str]) -> dict[ir.Node, ir.DataType]:
    """The type of every node that reads or makes floats."""
    islands = _in_float(graph, keep)
    types: dict[ir.Node, ir.DataType] = {}

    def given(node):
        """Types of the float inputs that a node computed."""
        return {types.get(v.producer(), FLOAT) for v in _float_inputs(node) if not v.is_initializer()} - {None}

    for node in graph:
        follows = node.op_type in _FOLLOWERS
        if not follows and not any(map(_is_float, node.outputs)) and not _float_inputs(node):
            continue
        if follows:
            # Those that have constants alone wait for what their readers want.
            types[node] = FLOAT if FLOAT in given(node) else half if given(node) else None
        elif _SAMPLE_PRODUCT.fullmatch(node.name) and half in given(node):
            types[node] = half
        else:
            types[node] = FLOAT if node.op_type not in _HALF_OPS or node in islands else half
        if types[node] == half and any(_overflows(value, half) for value in _float_inputs(node)):
            types[node] = FLOAT

    # What is read in FP32 alone becomes FP32, where that needs no cast more.
    for node in reversed(graph):
        movable = node.op_type in _FOLLOWERS or (node.op_type in _POINTWISE and given(node) == {FLOAT})
        if movable and node in types and types[node] != FLOAT:
            outputs = [output for output in node.outputs if _is_float(output)]
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
    if node is None:
        return set()
    if node.op_type in op_types:
        return {node}
    return set().union(*(_makers(v, op_types) for v in _float_inputs(node))) if node.op_type in _FOLLOWERS else set()


def _insert_casts(graph: ir.Graph, types: dict[ir.Node, ir.DataType]) -> None:
    """One cast for each value that is read in another type, however many nodes read it; constants are stored in the
    types in which they are read."""
    converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(graph):
        for i, value in enumerate(node.inputs):
            if value is None or not _is_float(value):
                continue
            wanted = _wanted(types, node, i)
            if value.dtype == wanted:
                continue
            if (value, wanted) not in converted:
                make = _stored if value.is_initializer() else _cast
                converted[value, wanted] = make(graph, value, wanted)
            node.replace_input_with(i, converted[value, wanted])
    for (value, _), other in converted.items():
        if value.is_initializer() and not value.uses():
            name = value.name
            graph.initializers.pop(name)
            graph.initializers.pop(other.name)
            other.name = other.const_value.name = name
            graph.initializers[name] = other


def _stored(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    name = f"{value.name}.{dtype.name.lower()}"
    tensor = ir.tensor(value.const_value.numpy().astype(dtype.numpy()), dtype=dtype, name=name)
    stored = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype), const_value=tensor)
    graph.initializers[name] = stored
    return stored


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    producer = value.producer()
    name = f"{producer.name if producer else value.name}/Cast"
    result = ir.Value(name=f"{value.name}.{dtype.name.lower()}", shape=value.shape, type=ir.TensorType(dtype))
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], outputs=[result], name=name)
    if producer is None:
        graph.insert_before(next(iter(graph)), node)
    else:
        graph.insert_after(producer, node)
    return result


def _float_inputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None and _is_float(value)]


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _is_dequantized(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _overflows(value: ir.Value, half: ir.DataType) -> bool:
    if not value.is_initializer():
        return False
    largest = float(np.abs(value.const_value.numpy()).max(initial=0))
    return np.isfinite(largest) and largest > float(half.max)
