"""Operations and parameters of an exported model: as `flops.count_flops`, from the graph's own nodes."""

from __future__ import annotations

import math
import os
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript import optimizer

from .. import artifact
from ..errors import LiteDetrError
from ..ops import onnx_schema, schema
from .config import parse_variant
from .flops import Cost, FlopCount, attention_cost, cost_of

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_POINTWISE = {
    "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sqrt", "Reciprocal", "Exp", "Log", "Pow", "Erf", "Sin", "Cos", "Sigmoid",
    "Tanh", "Relu", "Gelu", "Clip", "Min", "Max", "Floor", "Ceil", "Round", "Sign", "Mod", "Sum",
}  # fmt: skip
_MODULE = "detector."


def count_onnx_flops(path: str | os.PathLike, image_size: tuple[int, int] | None = None) -> FlopCount:
    """Count one image, of (height, width) where the model's size is dynamic; raise LiteDetrError for a file that
    `litedetr export` did not write, or another size than the model's."""
    model = artifact.load_onnx(path)
    metadata = artifact.onnx_metadata(model, path)
    fixed = metadata.get("image_size")
    if fixed and image_size and tuple(fixed) != tuple(image_size):
        raise LiteDetrError(
            f"{path} takes images of {fixed[0]}x{fixed[1]}, not of {image_size[0]}x{image_size[1]}. Leave the size "
            "out, or export with that size or with dynamic sizes."
        )
    if not (fixed or image_size):
        raise LiteDetrError(f"{path} takes images of any size: say which to count, as in 800x1333.")
    height, width = fixed or image_size
    graph = _with_shapes(model, (height, width))
    costs = []
    for node in graph:
        try:
            kind, fvcore, everything = _cost(node)
        except (TypeError, AttributeError) as error:  # a size that is no number, or no shape
            raise LiteDetrError(
                f"{path}: the shapes at node {node.name!r} do not follow from the image's size. Export with that size "
                "fixed (--image-size)."
            ) from error
        if fvcore or everything:
            costs.append(Cost(_module((node.name or "").split("/")[0]), kind, fvcore, everything))
    parameters: dict[str, int] = {}
    for name, weight in graph.initializers.items():
        # What the export computed from constants is no weight.
        if name.startswith(_MODULE) and weight.dtype in _FLOATS:
            module = _module(name).rpartition(".")[0]
            parameters[module] = parameters.get(module, 0) + _numbers(weight)
    return FlopCount(parse_variant(str(metadata.get("variant"))), (height, width), tuple(costs), parameters)


def _module(name: str) -> str:
    return name.removeprefix(_MODULE) if name.startswith(_MODULE) else ""


def _with_shapes(model: onnx.ModelProto, size: tuple[int, int]) -> ir.Graph:
    """Return the graph for one image of `size`, with what follows from that computed: the shape of every value."""
    onnx_schema.register()
    converted = ir.from_proto(model)
    wanted = {"images": (1, 3, *size), "pixel_mask": (1, *size), "orig_target_sizes": (1, 2)}
    for node in converted.graph:
        for output in node.outputs:
            output.shape = None
    for value in converted.graph.inputs:
        value.shape = ir.Shape(wanted[str(value.name)])
    optimizer.fold_constants(converted, onnx_shape_inference=True)
    return converted.graph


def _numbers(value: Any) -> int:
    return math.prod(int(size) for size in value.shape)


def _cost(node: Any) -> tuple[str, int, int]:
    op, inputs, output = node.op_type, node.inputs, node.outputs[0]
    if node.domain == schema.DOMAIN:
        head_dim = inputs[1].shape[2] // node.attributes["num_heads"].as_int()
        costs = attention_cost(op, _numbers(inputs[3]) // 2, head_dim, len(inputs) > 5 and inputs[5] is not None)
        return "deformable attention", *costs
    if op == "Conv":
        return cost_of("convolution", _numbers(output) * _numbers(inputs[1]) // inputs[1].shape[0])
    if op in ("MatMul", "Gemm"):
        transposed = "transA" in node.attributes and node.attributes["transA"].as_int()
        return cost_of("matrix product", _numbers(output) * int(inputs[0].shape[0 if transposed else -1]))
    if op in ("LayerNormalization", "InstanceNormalization", "GroupNormalization"):
        return cost_of("norm", _numbers(inputs[0]))
    if op == "GridSample":
        return cost_of("sampling", _numbers(output))
    if op == "Softmax":
        return cost_of("softmax", _numbers(output))
    if op == "MaxPool":
        return cost_of("pooling", _numbers(output) * math.prod(node.attributes["kernel_shape"].as_ints()))
    if op.startswith("Reduce") and inputs[0].dtype in _FLOATS:
        return cost_of("reduction", _numbers(inputs[0]))
    if op in _POINTWISE and output.dtype in _FLOATS:
        return cost_of("pointwise", _numbers(output))
    return "", 0, 0
