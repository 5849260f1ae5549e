"""What the types of a typed graph do to its values: the modules that round, the same rounding in PyTorch, and a twin
for engines without kernels of these types."""

from __future__ import annotations

import numpy as np
import onnx
import torch

from ..ops import schema

LARGEST = 127  # of symmetric INT8; -128 is not used
_SMALLEST_STEP = np.float16(2.0**-24)  # of a tensor or channel that is zero throughout


def modules(model: onnx.ModelProto) -> dict[str, float | None]:
    """The modules whose convolution or matrix product is half or INT8, and of the latter the step of their input."""
    makers = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    found: dict[str, float | None] = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        module = node.name.rpartition("/")[0]
        data, weight = (makers.get(name) for name in node.input[:2])
        if data is not None and weight is not None and data.op_type == weight.op_type == "DequantizeLinear":
            found[module] = float(onnx.numpy_helper.to_array(constants[data.input[1]]))
        elif node.input[1] in constants and constants[node.input[1]].data_type in halves:
            found[module] = None
    return found


def float_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph for an engine without half kernels: nodes read half inputs widened to FP32, and what they give is
    rounded to half again.  The attention ops and casts, which ONNX Runtime has in every type, stay."""
    twin = onnx.ModelProto()
    twin.CopyFrom(onnx.shape_inference.infer_shapes(model, strict_mode=True))
    graph = twin.graph
    kinds = {info.name: info.type.tensor_type.elem_type for info in (*graph.value_info, *graph.input, *graph.output)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    nodes, widened = [], {}

    def cast(source, target, kind):
        nodes.append(onnx.helper.make_node("Cast", [source], [target], to=kind))

    for node in graph.node:
        if node.op_type == "Cast" or node.domain == schema.DOMAIN:
            nodes.append(node)
            continue
        for i, name in enumerate(node.input):
            if kinds.get(name) in halves:
                if name not in widened:
                    widened[name] = f"{name}/widened"
                    cast(name, widened[name], onnx.TensorProto.FLOAT)
                node.input[i] = widened[name]
        nodes.append(node)
        for i, name in enumerate(node.output):
            if kinds.get(name) in halves:
                node.output[i] = f"{name}/wide"
                cast(node.output[i], name, kinds[name])
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return twin


def fake_quantized(x: torch.Tensor, step: float | torch.Tensor) -> torch.Tensor:
    """`x` rounded to whole steps that INT8 has, in its own type."""
    return (x / step).round().clamp(-LARGEST, LARGEST) * step


def fake_quantized_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, ...] rounded to steps of its channels."""
    return fake_quantized(weight, torch.from_numpy(steps_of(weight.numpy(), 0)))


def steps_of(weight: np.ndarray, axis: int) -> np.ndarray:
    """The step of every channel, float32 [1, ..., channels, ..., 1]."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    return step_of(np.abs(weight).max(others, keepdims=True))


def step_of(largest) -> np.ndarray:
    """The smallest float16 number of which LARGEST reach `largest`, as float32."""
    exact = np.asarray(largest, np.float32) / np.float32(LARGEST)
    step = exact.astype(np.float16)
    step = np.where(step < exact, np.nextafter(step, np.float16(np.inf)), step)
    return np.asarray(np.maximum(step, _SMALLEST_STEP), np.float32)
