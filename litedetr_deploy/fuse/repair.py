"""What exporters write and ONNX Runtime does not load, where it can be repaired without a doubt."""

from __future__ import annotations

import itertools

import onnx
from onnx import TensorProto, helper

from ..errors import LiteDetrError
from ..runtime.session import create_session
from . import types


def repair(proto: onnx.ModelProto, path: object) -> tuple[onnx.ModelProto, list[str]]:
    """Return the graph as ONNX Runtime loads it, and what was changed; raise LiteDetrError for one that it does not.

    A graph in types that only its CPU lacks passes: see `types`.
    """
    done, proto = [], _copy(proto)
    if count := _eye_like(proto.graph):
        done.append(f"{count} EyeLike of type bool made as int64")
    wide = types.as_float(proto, types.HALVES)
    why = _why_not(wide)
    if why and types.holds(proto, [TensorProto.DOUBLE]):
        # TorchScript computes grids of a fixed size in float64.
        single, narrow = types.as_float(proto, [TensorProto.DOUBLE]), types.as_float(wide, [TensorProto.DOUBLE])
        if (still := _why_not(narrow)) is None:
            return single, [*done, "float64 made float32"]
        why = still
    if why:
        raise LiteDetrError(
            f"{path} cannot be loaded by ONNX Runtime, which is what the fused model is compared in: {why} Export the "
            "model again with another version of its exporter, or another opset."
        )
    return proto, done


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    return copied


def _why_not(proto: onnx.ModelProto) -> str | None:
    try:
        create_session(proto.SerializeToString(), options=types.unoptimised())
    except LiteDetrError as error:
        cause = error.__cause__
        return f"{str(cause or error).strip().rstrip('.')}."
    return None


def _eye_like(graph: onnx.GraphProto) -> int:
    """Make every EyeLike of type bool one of int64 and a cast; return how many."""
    nodes, numbers = [], itertools.count(1)
    for node in graph.node:
        nodes.append(node)
        for attribute in node.attribute if node.op_type == "EyeLike" else ():
            if attribute.name == "dtype" and attribute.i == TensorProto.BOOL:
                attribute.i = TensorProto.INT64
                output, number = node.output[0], next(numbers)
                node.output[0] = f"{output}/int64"
                nodes.append(
                    helper.make_node("Cast", [node.output[0]], [output], f"EyeLike/bool_{number}", to=TensorProto.BOOL)
                )
    count = len(nodes) - len(graph.node)
    if count:
        del graph.node[:]
        graph.node.extend(nodes)
    return count
