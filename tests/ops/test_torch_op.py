"""torch.ops.litedetr against the reference; what it refuses; how PyTorch may use it."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from litedetr_deploy.ops import native, torch_op

from . import cases

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@cases.quick(max_examples=80)
@hypothesis.given(cases.shapes(dtype=DTYPES))
def test_equals_reference(shape):
    inputs = cases.make_inputs(shape)
    cases.assert_right(shape, inputs, cases.run_torch(shape, inputs))


@cases.quick(max_examples=40)
@hypothesis.given(cases.shapes(dtype=DTYPES, on_grid=True, maps=cases.POWER_MAPS))
def test_equals_reference_on_pixel_centres_edges_and_borders(shape):
    inputs = cases.make_inputs(shape)
    cases.assert_right(shape, inputs, cases.run_torch(shape, inputs))


@cases.quick(max_examples=60)
@hypothesis.given(cases.nonfinite_cases(dtype=DTYPES))
def test_nan_and_inf_spread_as_in_the_reference(case):
    shape, inputs = case
    cases.assert_spreads_right(shape, inputs, cases.run_torch(shape, inputs))


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["sampling_offsets", "reference_points"])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_sample_at_no_place_reads_nothing(key, width, name, number):
    for maps, queries in (((5, 7), (3, 4), (1, 1)), 5), (((20, 24), (10, 12), (5, 6), (3, 3)), 9):  # repacked, in place
        shape = cases.Shape(key=key, width=width, head_dim=16, maps=list(maps), queries=queries)
        inputs = cases.make_inputs(shape)
        cases.put_samples_nowhere(inputs, name, number)
        cases.assert_right(shape, inputs, cases.run_torch(shape, inputs))


@pytest.mark.parametrize("empty", ["batch", "queries"])
@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_empty_input_gives_empty_output(key, empty):
    shape = cases.Shape(key=key, **{empty: 0})
    output = cases.run_torch(shape, cases.make_inputs(shape))
    assert output.shape == (shape.batch, shape.queries, shape.heads * shape.head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equal_rows_give_equal_bits(dtype):
    shape = cases.Shape(dtype=dtype, queries=300, head_dim=32)
    output = cases.run_torch(shape, cases.repeat_rows(cases.make_inputs(shape), 3))
    assert torch.equal(output[0], output[1]) and torch.equal(output[0], output[2])


def test_strided_inputs():
    shape = cases.Shape()
    inputs = cases.make_inputs(shape)
    strided = {name: tensor.transpose(0, 1).contiguous().transpose(0, 1) for name, tensor in inputs.items()}
    assert not strided["value"].is_contiguous()
    assert torch.equal(cases.run_torch(shape, strided), cases.run_torch(shape, inputs))


def test_threads_do_not_share_scratch_memory():
    jobs = [cases.Shape(seed=seed, queries=200 + seed, head_dim=32) for seed in range(8)]
    inputs = [cases.make_inputs(shape) for shape in jobs]
    alone = [cases.run_torch(shape, tensors) for shape, tensors in zip(jobs, inputs, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(cases.run_torch, jobs * 4, inputs * 4))
    assert all(torch.equal(one, other) for one, other in zip(alone * 4, together, strict=True))


@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_opcheck(key):
    shape = cases.Shape(key=key)
    operator = torch.ops.litedetr.ms_deform_attn if key == "none" else torch.ops.litedetr.key_aware_deform_attn
    sizes = {"num_heads": shape.heads, "num_points": shape.points}
    torch.library.opcheck(operator.default, (), {**cases.make_inputs(shape), **sizes})


def test_compiles_in_one_graph():
    shape = cases.Shape()
    inputs = cases.make_inputs(shape)
    compiled = torch.compile(lambda tensors: cases.run_torch(shape, tensors), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs), cases.run_torch(shape, inputs))


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("query", torch.zeros(2, 5, 15), r"query has shape \[2, 5, 15\]; it should be \[2, 5, 16\]"),
        ("query", torch.zeros(3, 5, 16), r"query has shape \[3, 5, 16\]; it should be \[2, 5, 16\]"),
        ("query", torch.zeros(2, 5, 16).half(), "query is float16; it should be float32"),
        ("value", torch.zeros(48, 16), r"value has shape \[48, 16\]; it should have 3 dimensions"),
        ("value", torch.zeros(2, 48, 16).double(), "query is float32|value is float64; it should be float32"),
        ("key", torch.zeros(2, 47, 16), r"key has shape \[2, 47, 16\]; it should be \[2, 48, 16\]"),
        ("reference_points", torch.zeros(2, 5, 3, 3), r"reference_points has shape \[2, 5, 3, 3\]; .* 2 or 4"),
        ("reference_points", torch.zeros(2, 5, 3, 2).double(), "reference_points is float64; it should be float32"),
        ("sampling_offsets", torch.zeros(2, 5, 46), r"sampling_offsets has shape \[2, 5, 46\]; .* \[2, 5, 48\]"),
        (
            "sampling_offsets",
            torch.zeros(2, 5, 48).half(),
            r"sampling_offsets is float16; it should be float32; cast it with sampling_offsets.float\(\)",
        ),
        ("spatial_shapes", torch.tensor([[5, 7], [3, 4], [2, 1]]), "48 tokens"),
        ("spatial_shapes", torch.tensor([[5, 7], [3, 4], [1, 1]]).int(), "spatial_shapes is int32; it should be int64"),
        ("spatial_shapes", torch.tensor([[-5, -7], [3, 4], [1, 1]]), "spatial_shapes"),
    ],
)
def test_errors_name_the_tensor(name, wrong, message):
    shape = cases.Shape()
    with pytest.raises(ValueError, match=message):
        cases.run_torch(shape, cases.make_inputs(shape) | {name: wrong})


def test_error_on_heads_that_do_not_divide():
    shape = cases.Shape()
    with pytest.raises(ValueError, match="16 channels; they should divide by the 3 heads"):
        torch.ops.litedetr.key_aware_deform_attn(**cases.make_inputs(shape), num_heads=3, num_points=4)


def test_error_without_the_native_library(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_folders", lambda: [tmp_path])
    native.load_core.cache_clear()
    shape = cases.Shape()
    with pytest.raises(RuntimeError, match=r"liblitedetr_kda.so .* is not in .*`pip install"):
        cases.run_torch(shape, cases.make_inputs(shape))


def test_unknown_translation():
    with pytest.raises(ValueError, match="'grid_sample'; it should be one of 'op', 'gather', 'gridsample'"):
        torch_op.onnx_translations("grid_sample")


def test_cuda_wants_all_tensors_on_one_device():
    """What tests/gpu shows with real tensors."""
    cpu, cuda = (SimpleNamespace(device=torch.device(name), is_cuda=name != "cpu") for name in ("cpu", "cuda:1"))
    assert torch_op._common_cuda_device({"value": cuda, "spatial_shapes": cuda}) == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"spatial_shapes is on cpu; .* cuda:1, .*: spatial_shapes.to\('cuda:1'\)"):
        torch_op._common_cuda_device({"value": cuda, "spatial_shapes": cpu})


def test_cuda_gets_aligned_copies_of_slices():
    buffer = torch.arange(100, dtype=torch.float16)
    assert torch_op._contiguous_and_aligned(buffer) is buffer
    aligned = torch_op._contiguous_and_aligned(buffer[3:])
    assert aligned.data_ptr() % 16 == 0
    assert torch.equal(aligned, buffer[3:])
    assert torch_op._contiguous_and_aligned(buffer.view(10, 10).T).is_contiguous()
