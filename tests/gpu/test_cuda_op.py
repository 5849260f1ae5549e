"""torch.ops.litedetr on a CUDA device: right in every type and shape, and usable as PyTorch uses its own ops.

Needs torch alone; `python -m tests.gpu` runs it without pytest.
"""

import importlib.util
import itertools

import torch

from . import problems
from .problems import Shape, assert_right, make_inputs, run_op, run_reference

NEEDS_DEVICE = True  # conftest.py
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [
    # The usual attention in every type.
    *(
        Shape(key, dtype, width, float_offsets, head_dim)
        for key, dtype, width, float_offsets, head_dim in itertools.product(
            ("shared", "own", "none"), DTYPES, (2, 4), (False, True), (32, 64)
        )
        if not (float_offsets and dtype == torch.float32)
    ),
    # Other numbers of channels, levels and points.
    *(
        Shape(key, dtype, head_dim=head_dim, heads=3)
        for key, dtype, head_dim in itertools.product(("shared", "own", "none"), DTYPES, (8, 16, 24, 40, 96, 128))
    ),
    *(
        Shape(key, dtype, maps=maps, points=points, heads=2)
        for key, dtype in itertools.product(("shared", "own", "none"), DTYPES)
        for maps, points in (
            (((5, 7),), 1),
            (((8, 9), (4, 5), (1, 1)), 4),
            (((9, 4), (1, 6), (3, 3)), 5),
            (((12, 11), (6, 6), (3, 3), (2, 2), (1, 2)), 4),
            (((5, 5),) * 8, 8),
        )
    ),
    # Blocks of every size: few queries, many queries, none, one head, no batch.
    *(Shape(queries=queries, heads=1, batch=1) for queries in (0, 1, 31, 900, 5000)),
    Shape(queries=3000, batch=4),
    Shape(batch=0),
]


def test_equals_reference(shape):
    inputs = make_inputs(shape)
    assert_right(shape, inputs, run_op(shape, inputs))


def test_nan_reaches_exactly_what_it_reaches_in_the_reference():
    for key, dtype in itertools.product(("shared", "own", "none"), DTYPES):
        # References and offsets are short binary fractions, so that a weight of zero is zero in every dtype.
        shape = Shape(key, dtype, maps=((8, 16), (4, 8)), queries=200, heads=2)
        inputs = make_inputs(shape)
        inputs["reference_points"] = (inputs["reference_points"] * 16).round() / 16
        inputs["sampling_offsets"] = (inputs["sampling_offsets"] * 2).round() / 2
        for name in ("value", "key"):
            if name in inputs:
                inputs[name][0, 17, 3] = torch.nan
                inputs[name][1, 128, 40] = torch.inf
        wanted = run_reference(shape, inputs).isfinite()
        assert not wanted.all()
        assert torch.equal(run_op(shape, inputs).cpu().isfinite(), wanted), shape


def test_samples_at_no_place_read_nothing():
    shape = Shape(width=4, float_offsets=True)
    for wild in (torch.nan, torch.inf, -torch.inf, 1e30, -3e38):
        inputs = make_inputs(shape)
        inputs["sampling_offsets"][..., ::3] = wild
        inputs["reference_points"][0, ::2, :, 1] = wild
        assert_right(shape, inputs, run_op(shape, inputs))


def test_equal_rows_and_repeated_runs_give_equal_bits():
    for dtype in DTYPES:
        shape = Shape(dtype=dtype, batch=3, queries=1000)
        inputs = make_inputs(shape)
        for name, tensor in inputs.items():
            if name != "spatial_shapes":
                tensor[1:] = tensor[:1]
                if tensor.shape[1] == shape.queries:
                    tensor[:, -1] = tensor[:, 0]
        output = run_op(shape, inputs)
        assert torch.equal(output[0], output[1]) and torch.equal(output[0], output[2])
        assert torch.equal(output[:, 0], output[:, -1])
        assert all(torch.equal(run_op(shape, inputs), output) for _ in range(5))


def test_slices_and_strides():
    shape = Shape()
    inputs = make_inputs(shape)
    wanted = run_op(shape, inputs)
    strided = {name: tensor.transpose(0, 1).contiguous().transpose(0, 1) for name, tensor in inputs.items()}
    assert torch.equal(run_op(shape, strided), wanted)
    shifted = {}  # contiguous, but one element off any alignment
    for name, tensor in inputs.items():
        buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        shifted[name] = buffer[1:].view(tensor.shape).copy_(tensor)
    assert torch.equal(run_op(shape, shifted), wanted)


def test_cuda_graph():
    for key in ("shared", "own", "none"):
        shape = Shape(key)
        inputs, others = make_inputs(shape), make_inputs(shape, seed=1)
        run_op(shape, inputs)  # loads the kernel
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run_op(shape, inputs)
        for name, tensor in inputs.items():
            tensor.copy_(others[name])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, run_op(shape, others))


def test_current_stream():
    shape = Shape(queries=2000)
    inputs = make_inputs(shape)
    wanted = run_op(shape, inputs)
    late = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
    late["spatial_shapes"] = inputs["spatial_shapes"]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles; what follows on another stream would overtake it
        for name, tensor in late.items():
            tensor.copy_(inputs[name])
        output = run_op(shape, late)
        for name in ("query", "value"):
            late[name].zero_()
    stream.synchronize()
    assert torch.equal(output, wanted)


def test_compile():
    backends = ["aot_eager"] + ["inductor"] * (importlib.util.find_spec("triton") is not None)
    for backend, key in itertools.product(backends, ("shared", "none")):
        shape = Shape(key)
        inputs = make_inputs(shape)
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda tensors, shape=shape: run_op(shape, tensors) * 2, fullgraph=True, backend=backend
        )
        assert torch.equal(compiled(inputs), run_op(shape, inputs) * 2)


def test_tensors_elsewhere_are_named():
    shape = Shape()
    for name in ("spatial_shapes", "reference_points", "value"):
        inputs = make_inputs(shape)
        inputs[name] = inputs[name].cpu()
        try:
            run_op(shape, inputs)
        except ValueError as error:
            assert f"{name} is on cpu; it should be on {problems.DEVICE}" in str(error), error
        else:
            raise AssertionError(f"{name} on the CPU was taken")


def test_no_host_synchronisation():
    shape = Shape()
    inputs = make_inputs(shape)
    run_op(shape, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_op(shape, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
