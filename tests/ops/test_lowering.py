"""The ops as `torch.onnx.export` writes them: as one node, and in standard ONNX operators."""

import hypothesis
import hypothesis.strategies as st
import onnx
import pytest
import torch

from litedetr_deploy.ops import schema

from . import cases

# One export serves all cases of a kind, so the rest of the shape is fixed.
KINDS = [
    ("shared", 2, torch.float32),
    ("own", 4, torch.float32),
    ("none", 4, torch.float32),
    ("shared", 4, torch.float16),
]


def cases_of(key, width, dtype, **drawn):
    exported = cases.exported_shape(key, width, dtype)
    fixed = {"key": key, "width": width, "dtype": dtype, "float_offsets": False}
    fixed |= {name: getattr(exported, name) for name in ("heads", "head_dim", "points")}
    levels = len(exported.maps)
    fixed["maps"] = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=levels, max_size=levels)
    return fixed | drawn


@pytest.mark.parametrize("key, width, dtype", KINDS)
@pytest.mark.parametrize("attention", ["gather", "gridsample"])
def test_equals_reference(attention, key, width, dtype):
    session = cases.exported_session(attention, key, width, dtype)

    @cases.quick(max_examples=20)
    @hypothesis.given(cases.shapes(**cases_of(key, width, dtype)))
    def check(shape):
        inputs = cases.make_inputs(shape)
        cases.assert_right(shape, inputs, cases.run_session(session, inputs))

    check()


@pytest.mark.parametrize("key, width, dtype", KINDS)
@pytest.mark.parametrize("attention", ["gather", "gridsample"])
def test_nan_and_inf_spread_as_in_the_reference(attention, key, width, dtype):
    session = cases.exported_session(attention, key, width, dtype)
    maps = st.lists(st.tuples(cases.POWERS, cases.POWERS), min_size=3, max_size=3)

    @cases.quick(max_examples=20)
    @hypothesis.given(cases.nonfinite_cases(**cases_of(key, width, dtype, maps=maps)))
    def check(case):
        shape, inputs = case
        cases.assert_spreads_right(shape, inputs, cases.run_session(session, inputs))

    check()


@pytest.mark.parametrize("empty", ["batch", "queries"])
@pytest.mark.parametrize("attention", ["gather", "gridsample"])
def test_empty_input_gives_empty_output(attention, empty):
    shape = cases.Shape(**{empty: 0})
    session = cases.exported_session(attention, "shared", 2, torch.float32)
    assert cases.run_session(session, cases.make_inputs(shape)).shape == (shape.batch, shape.queries, 16)


@pytest.mark.parametrize("attention", ["gather", "gridsample"])
def test_equal_rows_give_equal_bits(attention):
    shape = cases.Shape(queries=50)
    session = cases.exported_session(attention, "shared", 2, torch.float32)
    output = cases.run_session(session, cases.repeat_rows(cases.make_inputs(shape), 3))
    assert torch.equal(output[0], output[1]) and torch.equal(output[0], output[2])


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["sampling_offsets", "reference_points"])
@pytest.mark.parametrize("key, width", [(key, width) for key, width, dtype in KINDS if dtype == torch.float32])
def test_gather_reads_nothing_at_no_place(key, width, name, number):
    shape = cases.exported_shape(key, width, torch.float32)
    inputs = cases.make_inputs(shape)
    cases.put_samples_nowhere(inputs, name, number)
    session = cases.exported_session("gather", key, width, torch.float32)
    cases.assert_right(shape, inputs, cases.run_session(session, inputs))


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("attention", ["gather", "gridsample"])
def test_lowerings_are_standard_onnx(attention, opset):
    model = cases.export(cases.Shape(), attention, opset)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": opset}
    operators = {node.op_type for node in model.graph.node}
    assert ("GridSample" in operators) == (attention == "gridsample")


@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_op_is_one_node(key):
    shape = cases.Shape(key=key)
    model = cases.export(shape, "op")
    (node,) = model.graph.node
    assert (node.domain, node.op_type) == (schema.DOMAIN, shape.op_type)
    assert list(node.input) == list(cases.make_inputs(shape))
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    wanted = {"num_heads": shape.heads, "num_points": shape.points, "plugin_version": b"1", "plugin_namespace": b""}
    assert attributes == wanted
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 17, schema.DOMAIN: schema.VERSION}


@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_exported_op_runs(key):
    shape = cases.Shape(key=key)
    inputs = cases.make_inputs(shape)
    cases.assert_right(shape, inputs, cases.run_session(cases.make_session(cases.export(shape, "op")), inputs))
