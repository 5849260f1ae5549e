"""Inputs for the ops on a CUDA device, and how far from the float64 reference they may be.

Apart from tests/ops/cases.py because the machines with a GPU may have torch and nothing else: no onnx, no hypothesis.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from litedetr_deploy.ops import reference, torch_op  # noqa: F401, registers the ops

DEVICE = "cuda"
TOLERANCE = 3  # times the error that PyTorch makes in the same dtype
LEVELS_4 = ((13, 20), (7, 10), (4, 5), (2, 3))


@dataclass(frozen=True)
class Shape:
    """What decides the shapes and types of a case."""

    key: str = "shared"  # 'shared', 'own', or 'none': the plain op
    dtype: torch.dtype = torch.float16
    width: int = 2  # of the references
    float_offsets: bool = False
    head_dim: int = 32
    maps: tuple = LEVELS_4  # (height, width), fine to coarse
    points: int = 4
    batch: int = 2
    queries: int = 77
    heads: int = 8

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.") + ("-float_offsets" if self.float_offsets else "")
        return (
            f"{self.key}-{dtype}-width{self.width}-D{self.head_dim}-L{len(self.maps)}-P{self.points}-"
            f"N{self.batch}-Q{self.queries}-M{self.heads}"
        )


def make_inputs(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """The op's inputs, in order, on the device; samples fall inside and outside the maps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator)

    n, q, m = shape.batch, shape.queries, shape.heads
    samples, channels = len(shape.maps) * shape.points, m * shape.head_dim
    tokens = sum(height * width for height, width in shape.maps)
    inputs = {
        "attention_logits" if shape.key == "none" else "query": normal(n, q, m * samples)
        if shape.key == "none"
        else normal(n, q, channels),
        "value": normal(n, tokens, channels),
        "reference_points": torch.rand(n, q, len(shape.maps), shape.width, generator=generator) * 1.2 - 0.1,
        "sampling_offsets": 2 * normal(n, q, m * samples * 2),
        "spatial_shapes": torch.tensor(shape.maps),
    }
    if shape.key == "own":
        inputs["key"] = normal(n, tokens, channels)
    kept = {"reference_points", "spatial_shapes"} | ({"sampling_offsets"} if shape.float_offsets else set())
    return {name: (tensor if name in kept else tensor.to(shape.dtype)).to(DEVICE) for name, tensor in inputs.items()}


def run_op(shape: Shape, inputs: dict[str, Tensor]) -> Tensor:
    ops = torch.ops.litedetr
    op = ops.ms_deform_attn if shape.key == "none" else ops.key_aware_deform_attn
    return op(**inputs, num_heads=shape.heads, num_points=shape.points)


def run_reference(shape: Shape, inputs: dict[str, Tensor], dtype: torch.dtype | None = torch.float64) -> Tensor:
    """The definition in `dtype`, on the CPU; None: in the types of the inputs."""
    define = reference.ms_deform_attn if shape.key == "none" else reference.key_aware_deform_attn
    cast = {
        name: tensor.cpu().to(dtype) if dtype and tensor.is_floating_point() else tensor.cpu()
        for name, tensor in inputs.items()
    }
    return define(**cast, num_heads=shape.heads, num_points=shape.points)


def assert_right(shape: Shape, inputs: dict[str, Tensor], output: Tensor) -> None:
    wanted = run_reference(shape, inputs)
    assert output.shape == wanted.shape and output.dtype == shape.dtype, (output.shape, output.dtype)
    if not output.numel():
        return
    pytorch = (run_reference(shape, inputs, None).double() - wanted).abs().max().item()
    # A lucky PyTorch must not take away one rounding of the output, nor the rounding of a coordinate, which moves a
    # sample by as many units as the map has pixels.
    value = inputs["value"].double().abs().max().item()
    side = max(map(max, shape.maps))
    floor = value * (torch.finfo(shape.dtype).eps / 2 + 16 * side * torch.finfo(torch.float32).eps)
    error = (output.cpu().double() - wanted).abs().max().item()
    assert error <= TOLERANCE * pytorch + floor, f"error {error:.2e}, allowed {TOLERANCE * pytorch + floor:.2e}"
