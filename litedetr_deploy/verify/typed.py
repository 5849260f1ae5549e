"""What the types of a typed graph do to its values: the modules that round, the same rounding in PyTorch, and a twin
for engines without kernels of these types."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
import torch
from torch import nn

from ..model.attention import SelfAttention
from ..model.detector import Detector
from ..model.resnet import Bottleneck, folded
from ..ops import schema

LARGEST = 127  # of symmetric INT8; -128 is not used
UNSIGNED_LARGEST = 255
_SMALLEST_STEP = np.float16(2.0**-24)  # of a tensor or channel that is zero throughout


class Grid(NamedTuple):
    """What a quantized tensor can hold: `low` to `high` whole steps."""

    step: float
    low: int
    high: int

    @classmethod
    def of(cls, largest: float, unsigned: bool = False) -> Grid:
        """Return the grid that reaches `largest`."""
        low, high = (0, UNSIGNED_LARGEST) if unsigned else (-LARGEST, LARGEST)
        return cls(float(step_of(largest, high)), low, high)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` rounded to the grid, in its own type."""
        return (x / self.step).round().clamp(self.low, self.high) * self.step


class Rounding(NamedTuple):
    """What a graph's types do in a module; None: what the graph has beside INT8."""

    input: Grid | None = None  # of a module whose product is INT8
    output: Grid | None = None
    int32_bias: bool = False  # whether the bias is in whole steps of the product


def modules(model: onnx.ModelProto) -> dict[str, Rounding]:
    """Return what is rounded in the modules whose convolution or matrix product is half or INT8, or whose output is
    quantized at once."""
    makers = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    outputs = {node.input[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear"}

    def grid(node: onnx.NodeProto) -> Grid:
        step, zero = (onnx.numpy_helper.to_array(constants[name]) for name in node.input[1:3])
        low, high = (0, UNSIGNED_LARGEST) if zero.dtype == np.uint8 and zero == 0 else (-LARGEST, LARGEST)
        return Grid(float(step), low, high)

    found: dict[str, Rounding] = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul", "Relu"):
            continue
        module = node.name.rpartition("/")[0]
        quantizer = outputs.get(node.output[0])
        output = grid(quantizer) if quantizer else None
        data, weight, bias = (makers.get(name) for name in (*node.input, "", "")[:3])
        if data is not None and data.op_type == "Reshape":  # to rows
            data = makers.get(data.input[0])
        if data is not None and weight is not None and data.op_type == weight.op_type == "DequantizeLinear":
            found[module] = Rounding(grid(data), output if node.op_type == "Conv" else None, bias is not None)
        elif node.op_type == "Relu":  # the last of a block is its output
            found.pop(module, None)
            if output and output.low == 0:
                found[module] = Rounding(None, output)
        elif node.input[1] in constants and constants[node.input[1]].data_type in halves:
            found[module] = Rounding()
    return found


def rounding_twin(model: Detector, graph: onnx.ModelProto, half: torch.dtype | None) -> Detector:
    """Return a copy of `model` whose modules round weights, inputs and outputs as `graph` does; half: its half type."""
    model = folded(model)
    roundings = modules(graph)

    def rounded(x, grid):
        if x is not None and grid is not None:
            return grid.rounded(x)
        return x if x is None or half is None else x.to(half).float()

    for name, module in model.named_modules():
        found = roundings.get(f"detector.{name}")
        if found is None or not isinstance(module, (nn.Conv2d, nn.Linear, SelfAttention, Bottleneck)):
            continue
        for parameter in module.parameters(recurse=False):
            quantized = found.input is not None and parameter.ndim > 1
            parameter.data = fake_quantized_weight(parameter.data) if quantized else rounded(parameter.data, None)
        module.register_forward_pre_hook(lambda _, inputs, grid=found.input: tuple(rounded(x, grid) for x in inputs))
        module.register_forward_hook(lambda _, inputs, output, grid=found.output: rounded(output, grid))
    return model


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


def fake_quantized_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, ...] rounded to steps of its channels."""
    steps = torch.from_numpy(steps_of(weight.numpy(), 0))
    return (weight / steps).round().clamp(-LARGEST, LARGEST) * steps


def fake_quantized_bias(bias: torch.Tensor, weight: torch.Tensor, data: Grid) -> torch.Tensor:
    """The bias [out] of that weight in whole steps of the product with the data."""
    steps = torch.from_numpy(steps_of(weight.numpy(), 0).ravel() * np.float32(data.step))
    return (bias / steps).round() * steps


def steps_of(weight: np.ndarray, axis: int) -> np.ndarray:
    """The step of every channel, float32 [1, ..., channels, ..., 1]."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    return step_of(np.abs(weight).max(others, keepdims=True))


def step_of(largest, steps: int = LARGEST) -> np.ndarray:
    """The smallest float16 number of which `steps` reach `largest`, as float32."""
    exact = np.asarray(largest, np.float32) / np.float32(steps)
    step = exact.astype(np.float16)
    step = np.where(step < exact, np.nextafter(step, np.float16(np.inf)), step)
    return np.asarray(np.maximum(step, _SMALLEST_STEP), np.float32)
