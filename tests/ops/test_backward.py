"""The gradients of torch.ops.litedetr against autograd through the reference in float64."""

import pytest
import torch
from torch import Tensor

from . import cases

LEVELS = [(6, 9), (5, 3), (2, 3), (1, 1)]
SHAPES = {
    "common": {"head_dim": 32, "maps": LEVELS, "queries": 30},
    "one item": {"head_dim": 32, "maps": LEVELS, "batch": 1, "heads": 8},
    "three points": {"head_dim": 8, "maps": LEVELS[:3], "batch": 3, "points": 3, "queries": 20},
    "two points": {"head_dim": 32, "maps": LEVELS[:2], "points": 2, "queries": 20},
    "one point": {"head_dim": 12, "maps": LEVELS[:1], "points": 1, "heads": 3, "queries": 30},
    "many samples": {"head_dim": 12, "maps": LEVELS * 2, "points": 8},
    "far": {"head_dim": 8, "spread": 9.0, "queries": 30},
    "on grid": {"head_dim": 16, "maps": [(4, 8), (2, 2), (1, 4)], "queries": 30, "on_grid": True},
}


def differentiate(run, shape: cases.Shape, inputs: dict[str, Tensor], dtype=None) -> dict[str, Tensor]:
    """The gradients of a fixed weighted sum of the output, by the name of the input; `dtype`: the inputs are cast."""
    leaves = {name: tensor.detach().to(dtype or tensor.dtype) for name, tensor in inputs.items()}
    leaves["spatial_shapes"] = inputs["spatial_shapes"]
    wanted = {name: leaf.requires_grad_() for name, leaf in leaves.items() if leaf.is_floating_point()}
    output = run(shape, leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return dict(zip(wanted, torch.autograd.grad(output, wanted.values(), weights), strict=True))


def run_reference(shape: cases.Shape, inputs: dict[str, Tensor]) -> Tensor:
    return cases.run_reference(shape, inputs, None)


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_equals_the_reference(key, width, sizes):
    """To four times the error of PyTorch in float32, and the roundings that a lucky PyTorch must not take away."""
    shape = cases.Shape(key=key, width=width, **sizes)
    inputs = cases.make_inputs(shape)
    wanted = differentiate(run_reference, shape, inputs, torch.float64)
    pytorch = differentiate(run_reference, shape, inputs)
    gradients = differentiate(cases.run_torch, shape, inputs)
    assert list(gradients) == list(wanted)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert gradient.shape == inputs[name].shape
        error = (gradient - wanted[name]).abs().max().item()
        allowed = 4 * (pytorch[name] - wanted[name]).abs().max().item()
        allowed += 8 * torch.finfo(torch.float32).eps * wanted[name].abs().max().item()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("offset", [1000.0, torch.inf, torch.nan])
@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_samples_outside_give_zero(key, offset):
    shape = cases.Shape(key=key, head_dim=32, maps=LEVELS)
    inputs = cases.make_inputs(shape)
    inputs["sampling_offsets"].fill_(offset)
    for name, gradient in differentiate(cases.run_torch, shape, inputs).items():
        assert not gradient.any(), name


@pytest.mark.parametrize("empty", ["batch", "queries"])
@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_empty_input_gives_zero(key, empty):
    shape = cases.Shape(key=key, **{empty: 0})
    inputs = cases.make_inputs(shape)
    for name, gradient in differentiate(cases.run_torch, shape, inputs).items():
        assert gradient.shape == inputs[name].shape
        assert not gradient.any(), name


@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_equal_bits_on_any_number_of_threads(key):
    shape = cases.Shape(key=key, width=4, head_dim=32, heads=3, maps=LEVELS, queries=50)
    inputs = cases.make_inputs(shape)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 5, 2):
            torch.set_num_threads(count)
            runs.append(differentiate(cases.run_torch, shape, inputs))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(gradient, runs[0][name]) for name, gradient in run.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_frozen_inputs_get_no_gradient(key, dtype):
    shape = cases.Shape(key=key, width=4, dtype=dtype)
    inputs = cases.make_inputs(shape)
    for name in inputs:
        if name == "spatial_shapes":
            continue
        leaves = {other: tensor.detach().clone() for other, tensor in inputs.items()}
        leaves[name].requires_grad_()
        cases.run_torch(shape, leaves).sum().backward()
        assert [other for other, leaf in leaves.items() if leaf.grad is not None] == [name]
        assert leaves[name].grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_other_types_are_differentiated_by_pytorch(key, dtype):
    shape = cases.Shape(key=key, dtype=dtype)
    inputs = cases.make_inputs(shape)
    wanted = differentiate(run_reference, shape, inputs)
    for name, gradient in differentiate(cases.run_torch, shape, inputs).items():
        assert torch.equal(gradient, wanted[name]), name


@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_autocast_computes_in_float32(key):
    shape = cases.Shape(key=key, head_dim=32, dtype=torch.bfloat16)
    inputs = cases.make_inputs(shape)

    def run_autocast(shape, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return cases.run_torch(shape, inputs)

    assert run_autocast(shape, inputs).dtype == torch.float32
    wanted = differentiate(cases.run_torch, shape, inputs, torch.float32)
    for name, gradient in differentiate(run_autocast, shape, inputs).items():
        assert gradient.dtype == inputs[name].dtype
        assert torch.equal(gradient, wanted[name].to(gradient.dtype)), name


def test_strided_tensors():
    shape = cases.Shape()
    inputs = cases.make_inputs(shape)

    def run_strided(shape, inputs):
        strided = {name: tensor.transpose(0, 1).contiguous().transpose(0, 1) for name, tensor in inputs.items()}
        output = cases.run_torch(shape, strided)
        return output.transpose(0, 1).contiguous().transpose(0, 1)  # so that its gradient comes strided

    wanted = differentiate(cases.run_torch, shape, inputs)
    for name, gradient in differentiate(run_strided, shape, inputs).items():
        assert torch.equal(gradient, wanted[name]), name


@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_opcheck(key):
    shape = cases.Shape(key=key)
    operator = torch.ops.litedetr.ms_deform_attn if key == "none" else torch.ops.litedetr.key_aware_deform_attn
    inputs = cases.make_inputs(shape)
    for tensor in inputs.values():
        tensor.requires_grad_(tensor.is_floating_point())
    torch.library.opcheck(operator.default, (), {**inputs, "num_heads": shape.heads, "num_points": shape.points})
