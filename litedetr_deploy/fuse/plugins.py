"""Plugin nodes of TensorRT that compute deformable attention, written as standard operators.

No runtime here runs the plugins; what they compute is known: bilinear samples at given locations in 0..1, weighted and
summed.  Written so, they are matched and compared as the graphs of others are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..errors import LiteDetrError

# Op type -> whether the output is [N, Q, M, D] instead of [N, Q, M*D].  Inputs: value [N, S, M, D], spatial_shapes
# [L, 2], level_start_index, sampling_locations [N, Q, M, L, P, 2], attention_weights [N, Q, M, L, P] or [N, Q, M, L*P].
PLUGINS = {"MultiscaleDeformableAttnPlugin_TRT": True, "MMCVMultiScaleDeformableAttention": False}
GRID_SAMPLE_DOMAIN = "com.microsoft"  # ONNX Runtime's own, which needs no opset of its own


def expand(proto: onnx.ModelProto, path: object) -> tuple[onnx.ModelProto, int]:
    """Return the graph with its plugin nodes in standard operators, and how many there were."""
    count = sum(node.op_type in PLUGINS for node in proto.graph.node)
    if not count:
        return proto, 0
    expanded = onnx.ModelProto()
    expanded.CopyFrom(proto)
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    while any(node.op_type in PLUGINS for node in expanded.graph.node):
        shapes = _shapes(expanded)  # anew: those behind a plugin are known once it is expanded
        constants = {tensor.name: tensor for tensor in expanded.graph.initializer}
        constants |= {
            node.output[0]: node.attribute[0].t
            for node in expanded.graph.node
            if node.op_type == "Constant" and node.attribute[0].name == "value"
        }
        nodes, stuck = [], None
        for node in expanded.graph.node:
            if node.op_type not in PLUGINS or stuck is not None:
                nodes.append(node)
                continue
            sizes = constants.get(node.input[1])
            value, locations = shapes.get(node.input[0]), shapes.get(node.input[3])
            known = sizes is not None and value is not None and locations is not None
            if not known or None in (*value[2:], *locations[2:]):
                stuck = node
                nodes.append(node)
                continue
            parts = list(_written(node, numpy_helper.to_array(sizes), value, locations, opset, expanded.graph))
            nodes += parts
        if stuck is not None and len(nodes) == len(expanded.graph.node):
            raise LiteDetrError(
                f"{path} holds the plugin {stuck.op_type} {stuck.name!r}, of which the sizes of the maps, heads or "
                "points are not constant, so that it cannot be written in standard operators. Export the model for one "
                "size."
            )
        del expanded.graph.node[:], expanded.graph.value_info[:]
        expanded.graph.node.extend(nodes)
    expanded.opset_import.append(helper.make_opsetid(GRID_SAMPLE_DOMAIN, 1))
    return expanded, count


def _shapes(proto: onnx.ModelProto) -> dict[str, list[int | None]]:
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    shapes = {
        info.name: [dim.dim_value or None for dim in info.type.tensor_type.shape.dim]
        for info in (*inferred.value_info, *inferred.input)
        if info.type.tensor_type.HasField("shape")
    }
    return shapes | {tensor.name: list(tensor.dims) for tensor in inferred.initializer}


def _written(node, sizes: np.ndarray, value, locations, opset: int, graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    heads, channels = value[2:]
    levels, points = locations[3:5]
    prefix, number = f"{node.name or node.output[0]}/expanded", iter(range(1 << 20))

    def op(op_type: str, *inputs: str, domain: str = "", output: str = "", **attributes) -> str:
        name = f"{prefix}/{op_type}_{next(number)}"
        made.append(helper.make_node(op_type, inputs, [output or f"{name}:0"], name, domain=domain, **attributes))
        return made[-1].output[0]

    def ints(*numbers: int) -> str:
        name = f"{prefix}/constant_{next(number)}"
        graph.initializer.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
        return name

    def like(scalar: float, other: str) -> str:
        """A number in the type of a value, which only the graph knows."""
        name = f"{prefix}/constant_{next(number)}"
        graph.initializer.append(numpy_helper.from_array(np.array([scalar], np.float32), name))
        return op("CastLike", name, other) if opset >= 15 else name

    made: list[onnx.NodeProto] = []
    source, _, _, places, weights = node.input[:5]
    queries = op("Slice", op("Shape", places), ints(1), ints(2), ints(0))
    grids = op("Sub", op("Mul", places, like(2.0, places)), like(1.0, places))
    samples, start = [], 0
    for level, (height, width) in enumerate(sizes.reshape(-1, 2).tolist()):
        end = start + height * width
        maps = op("Transpose", op("Slice", source, ints(start), ints(end), ints(1)), perm=[0, 2, 3, 1])
        maps = op("Reshape", maps, ints(-1, channels, height, width))
        name = f"{prefix}/constant_{next(number)}"
        graph.initializer.append(numpy_helper.from_array(np.array(level, np.int64), name))
        grid = op("Transpose", op("Gather", grids, name, axis=3), perm=[0, 2, 1, 3, 4])
        grid = op("Reshape", grid, op("Concat", ints(-1), queries, ints(points, 2), axis=0))
        samples.append(op("GridSample", maps, grid, domain=GRID_SAMPLE_DOMAIN, mode="bilinear", padding_mode="zeros"))
        start = end
    weights = op("Transpose", op("Reshape", weights, ints(0, 0, heads, levels * points)), perm=[0, 2, 1, 3])
    weights = op("Reshape", weights, op("Concat", ints(-1, 1), queries, ints(levels * points), axis=0))
    products = op("Mul", op("Concat", *samples, axis=3), weights)
    if opset >= 13:
        total = op("ReduceSum", products, ints(3), keepdims=0)
    else:
        total = op("ReduceSum", products, axes=[3], keepdims=0)
    total = op("Reshape", total, op("Concat", ints(-1, heads * channels), queries, axis=0))
    if PLUGINS[node.op_type]:
        op("Reshape", op("Transpose", total, perm=[0, 2, 1]), ints(0, 0, heads, channels), output=node.output[0])
    else:
        op("Transpose", total, perm=[0, 2, 1], output=node.output[0])
    yield from made
