"""Element types of a whole graph: what ONNX Runtime's CPU has no kernels for, widened or narrowed to float."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto

from ..runtime.session import create_session

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_NAMES = {"float": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16,
          "double": TensorProto.DOUBLE, "int64": TensorProto.INT64, "int32": TensorProto.INT32}  # fmt: skip


def unoptimised():
    """Return options of sessions that serve to ask something of a graph as it is."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def as_float(proto: onnx.ModelProto, kinds: Iterable[int]) -> onnx.ModelProto:
    """Return the same graph with float32 wherever it has one of these element types."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    _retype(changed.graph, set(kinds))
    return changed


def holds(proto: onnx.ModelProto, kinds: Iterable[int]) -> bool:
    """Whether a constant, an input or a cast of the graph has one of these element types."""
    kinds = set(kinds)
    graph = proto.graph
    return (
        any(tensor.data_type in kinds for tensor in graph.initializer)
        or any(info.type.tensor_type.elem_type in kinds for info in graph.input)
        or any(
            attribute.t.data_type in kinds or (attribute.name in ("to", "dtype") and attribute.i in kinds)
            for node in graph.node for attribute in node.attribute
        )
    )  # fmt: skip


def _retype(graph: onnx.GraphProto, kinds: set[int]) -> None:
    for tensor in graph.initializer:
        _retype_tensor(tensor, kinds)
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type in kinds:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _retype_tensor(attribute.t, kinds)
            elif attribute.type == onnx.AttributeProto.GRAPH:
                _retype(attribute.g, kinds)
            elif attribute.name in ("to", "dtype", "stash_type", "output_dtype") and attribute.i in kinds:
                attribute.i = TensorProto.FLOAT


def _retype_tensor(tensor: TensorProto, kinds: set[int]) -> None:
    if tensor.data_type in kinds:
        array = np.asarray(onnx.numpy_helper.to_array(tensor)).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def of_values(proto: onnx.ModelProto, names: Iterable[str]) -> dict[str, int]:
    """Return the element types of values as ONNX Runtime infers them."""
    probed = onnx.ModelProto()
    probed.CopyFrom(proto)
    del probed.metadata_props[:]
    constants = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    inputs = {info.name: info.type.tensor_type.elem_type for info in proto.graph.input}
    own = constants | inputs
    names = list(dict.fromkeys(names))
    asked = [name for name in names if name not in own]
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked)
    found = {}
    if asked:
        for value in create_session(probed.SerializeToString(), options=unoptimised()).get_outputs():
            found[value.name] = _NAMES.get(value.type.removeprefix("tensor(").removesuffix(")"), 0)
    return {name: own.get(name, found.get(name, 0)) for name in names}
