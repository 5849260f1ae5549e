"""The ONNX Runtime custom ops against the reference, what they refuse, and what the library exports."""

import subprocess

import hypothesis
import hypothesis.strategies as st
import onnx
import onnxruntime
import pytest
import torch

from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.ops import native, onnx_schema
from litedetr_deploy.runtime.session import create_session

from . import cases

DTYPES = st.sampled_from([torch.float32, torch.float16])


def run(shape, inputs, threads=1):
    return cases.run_session(cases.make_session(cases.make_op_model(shape), threads), inputs)


@cases.quick(max_examples=60)
@hypothesis.given(cases.shapes(dtype=DTYPES))
def test_equals_reference(shape):
    inputs = cases.make_inputs(shape)
    cases.assert_right(shape, inputs, run(shape, inputs))


@cases.quick(max_examples=30)
@hypothesis.given(cases.nonfinite_cases(dtype=DTYPES))
def test_nan_and_inf_spread_as_in_the_reference(case):
    shape, inputs = case
    cases.assert_spreads_right(shape, inputs, run(shape, inputs))


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["sampling_offsets", "reference_points"])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_sample_at_no_place_reads_nothing(key, width, name, number):
    shape = cases.Shape(key=key, width=width)
    inputs = cases.make_inputs(shape)
    cases.put_samples_nowhere(inputs, name, number)
    cases.assert_right(shape, inputs, run(shape, inputs))


@pytest.mark.parametrize("empty", ["batch", "queries"])
@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_empty_input_gives_empty_output(key, empty):
    shape = cases.Shape(key=key, **{empty: 0})
    assert run(shape, cases.make_inputs(shape)).shape == (shape.batch, shape.queries, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equal_rows_give_equal_bits(dtype):
    shape = cases.Shape(dtype=dtype, queries=300, head_dim=32)
    output = run(shape, cases.repeat_rows(cases.make_inputs(shape), 3), threads=2)
    assert torch.equal(output[0], output[1]) and torch.equal(output[0], output[2])


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_change_nothing(threads):
    shape = cases.Shape(queries=1000, head_dim=32)
    inputs = cases.make_inputs(shape)
    assert torch.equal(run(shape, inputs, threads), cases.run_torch(shape, inputs))


def test_one_session_runs_other_sizes():
    shape = cases.Shape()
    session = cases.make_session(cases.make_op_model(shape))
    for maps in ([(2, 3), (1, 1), (1, 2)], [(9, 8), (7, 1), (1, 6)], [(1, 1), (1, 1), (1, 1)]):
        other = cases.Shape(maps=maps, batch=len(maps[0]), queries=maps[0][0])
        inputs = cases.make_inputs(other)
        cases.assert_right(other, inputs, cases.run_session(session, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shape_inference(dtype):
    model = cases.make_op_model(cases.Shape(dtype=dtype))
    output = cases.make_session(model).get_outputs()[0]
    assert output.shape == ["value_0", "query_1", "value_2"]
    assert output.type == {torch.float32: "tensor(float)", torch.float16: "tensor(float16)"}[dtype]

    onnx_schema.register()
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output[0].type.tensor_type
    assert [size.dim_param for size in inferred.shape.dim] == ["query_0", "query_1", "value_2"]


@pytest.mark.parametrize("name, wrong, message", cases.WRONG_TENSORS)
def test_errors_name_the_op_and_the_tensor(name, wrong, message):
    shape = cases.Shape(key="own")
    session = cases.make_session(cases.make_op_model(shape))
    with pytest.raises(Exception, match=f"KeyAwareDeformAttn: .*{message}"):
        cases.run_session(session, cases.make_inputs(shape) | {name: wrong})


@pytest.mark.parametrize("key, op_type", [("shared", "KeyAwareDeformAttn"), ("none", "MSDeformAttn")])
def test_attribute_that_cannot_be(key, op_type):
    with pytest.raises(Exception, match=f"{op_type}: num_heads is 0; it must be at least 1"):
        cases.make_session(cases.make_op_model(cases.Shape(key=key), num_heads=0))


@pytest.mark.parametrize("version", ["2", "99", ""])
def test_other_version_of_the_op_is_refused(version):
    with pytest.raises(
        Exception, match=f"KeyAwareDeformAttn: plugin_version is '{version}'; this library has version 1"
    ):
        cases.make_session(cases.make_op_model(cases.Shape(), plugin_version=version))


@pytest.mark.parametrize("version", [2, 99])
def test_other_version_of_the_opset_is_refused(version):
    """By create_session: ONNX Runtime does not tell a custom op which version of its domain the model imports."""
    assert create_session(cases.make_op_model(cases.Shape()).SerializeToString())
    model = cases.make_op_model(cases.Shape(), version)
    with pytest.raises(LiteDetrError, match=f"imports version {version} of the opset 'litedetr'; .* version 1 .*xport"):
        create_session(model.SerializeToString())


def test_more_levels_or_points_than_the_kernels_take():
    shape = cases.Shape(maps=[(1, 1)] * 9)
    with pytest.raises(Exception, match="KeyAwareDeformAttn: spatial_shapes has 9 levels; the kernels take at most 8"):
        run(shape, cases.make_inputs(shape))
    with pytest.raises(Exception, match="KeyAwareDeformAttn: num_points is 9; the kernels take at most 8"):
        cases.make_session(cases.make_op_model(cases.Shape(points=9)))


@pytest.mark.parametrize("key, op_type", [("shared", "KeyAwareDeformAttn"), ("none", "MSDeformAttn")])
def test_half_offsets_of_float_values(key, op_type):
    model = cases.make_op_model(cases.Shape(key=key))
    model.graph.input[3].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    message = "sampling_offsets is float16 where value is float32; .*: cast the offsets to float32, or export the model"
    with pytest.raises(Exception, match=f"{op_type}: {message}"):
        cases.make_session(model)


def test_attribute_that_is_missing():
    model = cases.make_op_model(cases.Shape())
    attributes = [a for a in model.graph.node[0].attribute if a.name != "num_points"]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(attributes)
    with pytest.raises(Exception, match=r"KeyAwareDeformAttn: the attribute num_points \(int\) is missing"):
        cases.make_session(model)


def test_library_can_be_registered_again():
    path = str(native.library("onnxruntime"))
    for _ in range(3):
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(path)


def test_library_exports_its_entry_point_alone():
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", native.library("onnxruntime")], capture_output=True, text=True, check=True
    )
    assert [line.split()[-1] for line in listed.stdout.splitlines()] == ["RegisterCustomOps"]
