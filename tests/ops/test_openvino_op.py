"""The OpenVINO extension against the reference, what it refuses, what the CPU plugin makes of it, and its version."""

import functools
import shutil
import subprocess
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
import torch

import litedetr_deploy as ld
from litedetr_deploy.assets import shapes
from litedetr_deploy.ops import native
from litedetr_deploy.verify.reference import FLOORS
from litedetr_deploy.verify.verdict import compare

from . import cases

openvino = pytest.importorskip("openvino")

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
ENTRY = Path(__file__).parents[2] / "plugins" / "openvino" / "entry.cpp"


@functools.cache
def core():
    core = openvino.Core()
    core.add_extension(str(native.library("openvino")))
    return core


def compiled(model: onnx.ModelProto, threads: int = 1, **settings):
    settings = {"INFERENCE_NUM_THREADS": threads, **settings}
    return core().compile_model(core().read_model(model.SerializeToString()), "CPU", settings)


def tensor(values: torch.Tensor):
    """An OpenVINO tensor; NumPy has no bfloat16."""
    if values.dtype == torch.bfloat16:
        return openvino.Tensor(values.view(torch.int16).numpy(), list(values.shape), openvino.Type.bf16)
    return openvino.Tensor(values.numpy())


def infer(model, inputs) -> dict[str, torch.Tensor]:
    """Every output by its name.

    Asynchronously: with one thread OpenVINO 2026.4 loses the errors of `infer`, those of its own operations too.
    """
    request = model.create_infer_request()
    request.start_async({name: tensor(values) for name, values in inputs.items()})
    request.wait()
    outputs = {}
    for output in model.outputs:
        data = np.array(request.get_tensor(output).data)
        bf16 = output.element_type == openvino.Type.bf16
        values = torch.from_numpy(data.view(np.int16)).view(torch.bfloat16) if bf16 else torch.from_numpy(data)
        outputs[output.any_name] = values
    return outputs


def run(shape, inputs, threads=1):
    return infer(compiled(cases.make_op_model(shape), threads), inputs)["output"]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_rows_give_equal_bits(dtype):
    shape = cases.Shape(dtype=dtype, queries=300, head_dim=32)
    output = run(shape, cases.repeat_rows(cases.make_inputs(shape), 3), threads=2)
    assert torch.equal(output[0], output[1]) and torch.equal(output[0], output[2])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads):
    shape = cases.Shape(queries=1000, head_dim=32)
    inputs = cases.make_inputs(shape)
    assert torch.equal(run(shape, inputs, threads), cases.run_torch(shape, inputs))


def test_requests_run_side_by_side():
    """On the same nodes, with scratch memory of different sizes."""
    model = compiled(cases.make_op_model(cases.Shape()), threads=2, NUM_STREAMS=2)
    problems = [cases.Shape(queries=100 * (1 + i), maps=[(5 + i, 7), (3, 4), (1, 1)], seed=i) for i in range(4)]
    inputs = [cases.make_inputs(shape) for shape in problems]
    requests = [model.create_infer_request() for _ in problems]
    for _ in range(3):
        for request, feed in zip(requests, inputs):
            request.start_async({name: tensor(values) for name, values in feed.items()})
        for shape, request, feed in zip(problems, requests, inputs):
            request.wait()
            cases.assert_right(shape, feed, torch.from_numpy(np.array(request.get_output_tensor().data)))


def test_one_model_runs_other_sizes():
    model = compiled(cases.make_op_model(cases.Shape()))
    for maps in ([(2, 3), (1, 1), (1, 2)], [(9, 8), (7, 1), (1, 6)], [(1, 1), (1, 1), (1, 1)]):
        other = cases.Shape(maps=maps, batch=len(maps[0]), queries=maps[0][0])
        inputs = cases.make_inputs(other)
        cases.assert_right(other, inputs, infer(model, inputs)["output"])


@pytest.mark.parametrize("dtype, name", [(torch.float32, "f32"), (torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_shape_inference(dtype, name):
    model = core().read_model(cases.make_op_model(cases.Shape(dtype=dtype)).SerializeToString())
    model.reshape({"value": [2, "40..50", 16], "query": ["1..9", 5, -1]})
    assert str(model.output().partial_shape) == "[2,5,16]"
    assert model.output().element_type.to_string() == name


def test_optional_key_without_a_name():
    shape = cases.Shape()
    model = cases.make_op_model(shape)
    model.graph.node[0].input.append("")
    inputs = cases.make_inputs(shape)
    cases.assert_right(shape, inputs, infer(compiled(model), inputs)["output"])


def test_openvinos_own_file(tmp_path):
    shape = cases.Shape(key="own")
    model = core().read_model(cases.make_op_model(shape).SerializeToString())
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    inputs = cases.make_inputs(shape)
    output = infer(core().compile_model(core().read_model(tmp_path / "model.xml"), "CPU"), inputs)["output"]
    cases.assert_right(shape, inputs, output)


# ---- What the CPU plugin makes of the types ------------------------------------------------------------------


def test_bf16_hint_leaves_the_ops_inputs_float():
    """Matrix products run in BF16 and hand the op their FP32 sums, so that it computes what it computes in FP32."""
    if "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no BF16")
    shape = cases.Shape(maps=[(8, 8), (4, 4)], heads=2, head_dim=32, queries=20)
    model = cases.make_op_model(shape)
    (op,) = model.graph.node
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32) / 8
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "weights"))
    products = [
        onnx.helper.make_node("MatMul", [name, "weights"], [product])
        for name, product in (("query", "q"), ("value", "v"), ("output", "projected"))
    ]
    op.input[:2] = ["q", "v"]
    nodes = [*products[:2], onnx.NodeProto.FromString(op.SerializeToString()), products[2]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for name in ("q", "v", "projected"):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * 3))
    inputs = cases.make_inputs(shape)
    outputs = infer(compiled(model, INFERENCE_PRECISION_HINT="bf16"), inputs)

    rounded = inputs["query"].bfloat16().double() @ torch.from_numpy(weights).bfloat16().double()
    assert torch.allclose(outputs["q"].double(), rounded, rtol=0, atol=1e-5)  # the hint was heeded
    cases.assert_right(shape, inputs | {"query": outputs["q"], "value": outputs["v"]}, outputs["output"])


@pytest.mark.parametrize("width", [2, 4])
def test_half_references_of_a_plugin(width):
    """A plugin that computes in FP16, as on Arm processors, makes FP16 of the reference points too."""
    from openvino.passes import ConvertFP32ToFP16, Manager

    shape = cases.Shape(dtype=torch.float16, width=width)
    model = core().read_model(cases.make_op_model(cases.Shape(width=width)).SerializeToString())
    passes = Manager()
    passes.register_pass(ConvertFP32ToFP16())
    passes.run_passes(model)
    inputs = {name: t.half() if t.is_floating_point() else t for name, t in cases.make_inputs(shape).items()}
    assert model.input("reference_points").element_type == openvino.Type.f16
    output = openvino.Tensor(openvino.Type.f16, openvino.Shape([shape.batch, shape.queries, 16]))
    assert model.evaluate([output], [tensor(values) for values in inputs.values()])
    cases.assert_right(shape, inputs, torch.from_numpy(np.array(output.data)))


# ---- What is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, wrong, message", cases.WRONG_TENSORS)
def test_errors_name_the_op_and_the_tensor(name, wrong, message):
    shape = cases.Shape(key="own")
    model = compiled(cases.make_op_model(shape))
    with pytest.raises(RuntimeError, match=f"KeyAwareDeformAttn: .*{message}"):
        infer(model, cases.make_inputs(shape) | {name: wrong})


def test_sizes_that_are_fixed_are_checked_when_the_model_is_read():
    shape = cases.Shape()
    model = cases.make_op_model(shape)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 15
    model.graph.input[1].type.tensor_type.shape.dim[2].dim_value = 16
    with pytest.raises(RuntimeError, match=r"KeyAwareDeformAttn: query has shape \[-1, -1, 15\]; .* \[-1, -1, 16\]"):
        compiled(model)
    model = cases.make_op_model(shape)
    model.graph.input[1].type.tensor_type.shape.dim[2].dim_value = 12
    with pytest.raises(RuntimeError, match="KeyAwareDeformAttn: head_dim is 6; the CPU kernels take multiples of 4"):
        compiled(model)


@pytest.mark.parametrize("key, op_type", [("shared", "KeyAwareDeformAttn"), ("none", "MSDeformAttn")])
@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"num_heads": 0}, "num_heads is 0; it must be at least 1"),
        ({"num_points": 9}, "num_points is 9; the kernels take at most 8"),
        ({"num_heads": 2**32 + 1}, "the attribute num_heads is 4294967297; it should fit into 32 bits"),
        ({"num_heads": "two"}, r"the attribute num_heads \(int\) is missing"),
    ],
)
def test_attribute_that_cannot_be(key, op_type, attributes, message):
    with pytest.raises(RuntimeError, match=f"{op_type}: {message}"):
        compiled(cases.make_op_model(cases.Shape(key=key), **attributes))


@pytest.mark.parametrize("version", ["2", "99", ""])
def test_other_version_of_the_op_is_refused(version):
    """The version that the node carries: the front end does not tell which one the model imports."""
    message = f"KeyAwareDeformAttn: plugin_version is '{version}'; this library has version 1"
    with pytest.raises(RuntimeError, match=message):
        compiled(cases.make_op_model(cases.Shape(), plugin_version=version))


def test_more_levels_than_the_kernels_take():
    shape = cases.Shape(maps=[(1, 1)] * 9)
    with pytest.raises(RuntimeError, match="KeyAwareDeformAttn: spatial_shapes has 9 levels; the kernels take at most"):
        run(shape, cases.make_inputs(shape))


@pytest.mark.parametrize(
    "position, message",
    [
        (1, "query is f32; it should be of the type of value"),
        (2, "reference_points is f16; it should be f32"),
        (3, "sampling_offsets is float16 where value is float32; .*: cast the offsets to float32"),
    ],
)
def test_half_input_among_floats(position, message):
    model = cases.make_op_model(cases.Shape())
    model.graph.input[position].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with pytest.raises(RuntimeError, match=f"KeyAwareDeformAttn: {message}"):
        compiled(model)


def test_model_without_the_extension():
    with pytest.raises(RuntimeError, match="No conversion rule found for operations: litedetr.KeyAwareDeformAttn"):
        openvino.Core().read_model(cases.make_op_model(cases.Shape()).SerializeToString())


# ---- The library ---------------------------------------------------------------------------------------------


def test_other_openvino_is_refused(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    library = tmp_path / "liblitedetr_openvino.so"
    version = '-DLITEDETR_OPENVINO_VERSION="2025.0.0"'
    subprocess.run([compiler, "-std=c++17", "-fPIC", "-shared", version, ENTRY, "-o", library, "-ldl"], check=True)
    here = openvino.__version__.partition("-")[0]
    message = rf"compiled for OpenVINO 2025\.0\.0 and this is OpenVINO {here}: install openvino==2025\.0\.0, or install"
    with pytest.raises(RuntimeError, match=message):
        openvino.Core().add_extension(str(library))


def test_ops_library_that_is_missing(tmp_path):
    shutil.copy(native.library("openvino"), tmp_path)
    message = "the litedetr ops cannot be loaded: .*liblitedetr_openvino_ops.so.*; install litedetr-deploy again"
    with pytest.raises(RuntimeError, match=message):
        openvino.Core().add_extension(str(tmp_path / native.library("openvino").name))


def test_libraries_export_their_entry_points_alone():
    path = native.library("openvino")
    for library, entry in ((path, "create_extensions"), (path.with_stem(f"{path.stem}_ops"), None)):
        command = ["nm", "-D", "--defined-only", library]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        assert [line.split()[-1] for line in listed] == [entry or "litedetr_create_extensions"]


def test_model_outlives_the_core_that_read_it():
    shape = cases.Shape()
    other = openvino.Core()
    other.add_extension(str(native.library("openvino")))
    model = other.read_model(cases.make_op_model(shape).SerializeToString())
    del other
    inputs = cases.make_inputs(shape)
    cases.assert_right(shape, inputs, infer(core().compile_model(model, "CPU"), inputs)["output"])


# ---- A detector ----------------------------------------------------------------------------------------------


def test_shipped_detector_computes_what_it_does_in_onnx_runtime(tmp_path):
    path = tmp_path / "model.onnx"
    model = ld.load_model("lite-dino-shapes")
    ld.export_onnx(model, path, image_size=(256, 256), outputs="raw", verify=False)
    image = np.asarray(shapes.scene(0, shapes.VALIDATION_SEED)[0], np.float32).transpose(2, 0, 1)[None] / 255
    session = ld.create_session(path)
    names = [output.name for output in session.get_outputs()]
    wanted = dict(zip(names, session.run(None, {"images": image})))

    read = core().read_model(path)
    assert sum(op.get_type_name() == "KeyAwareDeformAttn" for op in read.get_ops()) == 9
    settings = {"INFERENCE_NUM_THREADS": 2, "INFERENCE_PRECISION_HINT": "f32"}
    outputs = infer(core().compile_model(read, "CPU", settings), {"images": torch.from_numpy(image)})
    largest_logit = np.abs(wanted["pred_logits"]).max()
    tolerances = {"pred_logits": FLOORS["pred_logits"] * largest_logit, "pred_boxes": FLOORS["pred_boxes"]}
    verdict = compare({name: values.numpy() for name, values in outputs.items()}, wanted, tolerances)
    assert verdict.passed, str(verdict)
