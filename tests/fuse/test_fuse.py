"""Deformable attention in files of others: what is fused, what is left, and that the results are those of PyTorch."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import litedetr_deploy as ld
from litedetr_deploy.artifact import CANNOT_TELL, METADATA_KEY, VERIFIED, distrust, onnx_metadata
from litedetr_deploy.errors import CheckFailed, LiteDetrError
from litedetr_deploy.fuse import compare, emit, plugins, types
from litedetr_deploy.ops import reference, schema

from . import attention

UNEVEN = {"form": "concatenated", "points": (3, 6, 2)}
FORMS = {
    "stacked": {},
    "stacked, boxes": {"boxes": True},
    "concatenated": {"form": "concatenated"},
    "concatenated, boxes": {"form": "concatenated", "boxes": True},
    "uneven": UNEVEN,
    "uneven, boxes": UNEVEN | {"boxes": True},
    "absolute": {"locations": "absolute"},
    "absolute, uneven": UNEVEN | {"locations": "absolute"},
    "weights": {"weights": "given"},
    "weights in another order": {"wrong": "order"},
}
TAKEN_OVER = {
    "absolute": "absolute locations, logits",
    "absolute, uneven": "absolute locations, logits",
    "weights": "reference points and offsets, weights",
    "weights in another order": "reference points and offsets, weights",
}
LEFT = {
    "value": ({"wrong": "value"}, "the value cannot be followed beyond Add '/value_proj/Add'"),
    "grid": ({"wrong": "grid"}, "the sampling locations cannot be followed beyond Add"),
    "output": ({"wrong": "output"}, "no value has the order"),
    "corners": ({"sampling": {"align_corners": True}}, "its align_corners is 1"),
    "border": ({"sampling": {"padding_mode": "border"}}, "its padding_mode is 'border'"),
    "nearest": ({"sampling": {"mode": "nearest"}}, "its mode is 'nearest'"),
    "weights that add up to anything": ({"weights": "any"}, "does not compute the same"),
    "thin heads": ({"channels": 24}, "its heads have 6 channels"),
}


def ops(path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def check_against_pytorch(path, n: int = 1, **options):
    """The fused file computes what the module does in float64."""
    model, given = attention.Attention(**options).eval(), attention.inputs(n, options.get("boxes", False))
    with torch.no_grad():
        wanted = model.double()(*(value.double() for value in given.values())).numpy()
    session = ld.create_session(path)
    names = [value.name for value in session.get_inputs()]
    (found,) = session.run(None, {name: given[name].numpy() for name in names})
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, tmp_path):
    options = FORMS[form]
    original = attention.export(tmp_path / "original.onnx", batch=True, **options)
    report = ld.fuse_onnx(original, tmp_path / "fused.onnx")
    assert report.passed and report.verdict.status == VERIFIED, report.verdict
    assert [region["form"] for region in report.regions] == [
        TAKEN_OVER.get(form, "reference points and offsets, logits")
    ]
    assert report.left == [] and ops(report.path).count(schema.PLAIN) == 1 and "GridSample" not in ops(report.path)
    for n in (1, 2, 3):
        check_against_pytorch(report.path, n, **options)


@pytest.mark.parametrize("form", ["stacked", "uneven, boxes", "absolute"])
def test_standard_operators(form, tmp_path):
    original = attention.export(tmp_path / "original.onnx", batch=True, **FORMS[form])
    report = ld.fuse_onnx(original, tmp_path / "fused.onnx", attention="gather")
    assert report.verdict.status == VERIFIED, report.verdict
    graph = onnx.load(report.path)
    assert "GridSample" not in ops(report.path) and {entry.domain for entry in graph.opset_import} == {""}
    onnx.checker.check_model(graph, full_check=True)
    check_against_pytorch(report.path, 3, **FORMS[form])


@pytest.mark.parametrize("case", LEFT)
def test_what_is_almost_right_stays(case, tmp_path):
    options, why = LEFT[case]
    original = attention.export(tmp_path / "original.onnx", batch=True, **options)
    with pytest.raises(CheckFailed, match="nothing was written") as error:
        ld.fuse_onnx(original, tmp_path / "fused.onnx")
    assert why in str(error.value) and "'/GridSample'" in str(error.value)
    assert list(tmp_path.iterdir()) == [original]


def test_thin_heads_in_standard_operators(tmp_path):
    original = attention.export(tmp_path / "original.onnx", channels=24)
    assert ld.fuse_onnx(original, tmp_path / "fused.onnx", attention="gather").verdict.status == VERIFIED


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype, tmp_path):
    original = attention.export(tmp_path / "original.onnx", batch=True, dtype=dtype, **FORMS["uneven, boxes"])
    report = ld.fuse_onnx(original, tmp_path / "fused.onnx")
    assert report.verdict.status == VERIFIED, report.verdict
    kind = TensorProto.FLOAT16 if dtype == torch.float16 else TensorProto.BFLOAT16
    assert report.metadata["precision"] == ("fp16" if dtype == torch.float16 else "bf16")
    assert types.holds(onnx.load(report.path), [kind])
    assert report.verdict.ran.startswith("the model and") == (dtype == torch.float16)


def test_quantized_linears(tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = [{name: value.numpy() for name, value in attention.inputs().items()}]

        def get_next(self):
            return self.left.pop() if self.left else None

    original = attention.export(tmp_path / "original.onnx", **FORMS["stacked"])
    quantized = tmp_path / "quantized.onnx"
    quantize_static(original, quantized, Reader(), QuantFormat.QDQ, op_types_to_quantize=["MatMul"])
    report = ld.fuse_onnx(quantized, tmp_path / "fused.onnx")
    assert report.verdict.status == VERIFIED and report.metadata["precision"] == "int8"
    assert ops(report.path).count("QuantizeLinear") == ops(quantized).count("QuantizeLinear")


def test_flat_attention_cannot_tell(tmp_path):
    """Logits that are all zero are zero when they are wrong by 1 %."""
    original = attention.export(tmp_path / "original.onnx")
    model = onnx.load(original)
    for tensor in model.graph.initializer:
        if tensor.dims == [32, 48]:  # MatMul of the logits
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros((32, 48), np.float32), tensor.name))
        elif tensor.name == "logits.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(48, np.float32), tensor.name))
    onnx.save(model, original)
    report = ld.fuse_onnx(original, tmp_path / "fused.onnx")
    assert report.verdict.status == CANNOT_TELL and not report.passed
    assert "off by 1 %" in str(report.verdict) and distrust(report.path, report.metadata)


def test_a_region_that_is_wrong_by_one_percent_stays(tmp_path, monkeypatch):
    original = attention.export(tmp_path / "original.onnx")
    write = emit.write
    monkeypatch.setattr(emit, "write", lambda *arguments: write(*arguments[:6], "offsets"))
    with pytest.raises(CheckFailed, match="does not compute the same"):
        ld.fuse_onnx(original, tmp_path / "fused.onnx")


def test_a_fused_graph_that_is_wrong_elsewhere_fails(tmp_path, monkeypatch):
    original = attention.export(tmp_path / "original.onnx")
    whole = compare.compare_whole

    def spoiled(verdict, case, before, after, feed):
        for tensor in after.graph.initializer:
            if tensor.name == "output_proj.bias":
                array = onnx.numpy_helper.to_array(tensor) + np.float32(0.1)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        whole(verdict, case, before, after, feed)

    monkeypatch.setattr(compare, "compare_whole", spoiled)
    report = ld.fuse_onnx(original, tmp_path / "fused.onnx")
    assert not report.passed and "output" in report.verdict.why


def test_the_file_says_what_it_is(tmp_path):
    original = attention.export(tmp_path / "original.onnx")
    report = ld.fuse_onnx(original, tmp_path / "fused.onnx")
    assert distrust(report.path, report.metadata) == ""
    assert report.metadata["fused_from"]["name"] == "original.onnx" and report.metadata["attention"] == "op"
    assert json.loads((tmp_path / "fused.json").read_text()) == report.to_dict()
    model = onnx.load(report.path)
    model.graph.node[0].doc_string = "changed"
    onnx.save(model, report.path)
    assert "rewritten" in distrust(report.path, report.metadata)


def test_what_this_package_wrote_keeps_what_it_says(tmp_path):
    original = attention.export(tmp_path / "original.onnx")
    model = onnx.load(original)
    own = {"class_names": ["cat"], "attention": "gridsample", "verification": {"verdict": "failed"}}
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(own))
    onnx.save(model, original)
    report = ld.fuse_onnx(original, tmp_path / "fused.onnx")
    found = onnx_metadata(onnx.load(report.path), report.path)
    assert found["class_names"] == ["cat"] and found["attention"] == "op"
    assert found["verification"]["verdict"] == VERIFIED


def test_unverified(tmp_path):
    report = ld.fuse_onnx(attention.export(tmp_path / "original.onnx"), tmp_path / "fused.onnx", verify=False)
    assert report.passed and str(report.verdict) == "not verified: it was not asked for"


def test_given_inputs(tmp_path):
    original = attention.export(tmp_path / "original.onnx", batch=True)
    given = {name: value.numpy() for name, value in attention.inputs(4).items()}
    assert ld.fuse_onnx(original, tmp_path / "fused.onnx", inputs=given).verdict.status == VERIFIED
    with pytest.raises(LiteDetrError, match="the model has tokens, queries, references"):
        ld.fuse_onnx(original, tmp_path / "fused.onnx", inputs={"images": given["tokens"]})


def test_an_output_whose_shape_is_asked_for(tmp_path):
    """A node that reads the shape of samples does not keep the region as it is; what remains of it is named."""
    original = attention.export(tmp_path / "original.onnx")
    model = onnx.load(original)
    sampler = next(node for node in model.graph.node if node.op_type == "GridSample")
    model.graph.node.append(helper.make_node("Shape", [sampler.output[0]], ["shape"], "shape"))
    model.graph.output.append(helper.make_tensor_value_info("shape", TensorProto.INT64, [4]))
    onnx.save(model, original)
    report = ld.fuse_onnx(original, tmp_path / "fused.onnx")
    assert report.verdict.status == VERIFIED and ops(report.path).count("GridSample") == 1
    assert [left["names"] for left in report.left] == [(sampler.name,)]


def plugin_model(op_type: str, batch: int = 2) -> onnx.ModelProto:
    """A model of one plugin node, as TAO's and mmdeploy's exports have it."""
    heads, channels, levels, points = 4, 8, len(attention.SIZES), 4
    tokens = sum(height * width for height, width in attention.SIZES)
    shapes = {
        "value": [batch, tokens, heads, channels], "offsets": [batch, 10, heads, levels, points, 2],
        "logits": [batch, 10, heads, levels * points],
    }  # fmt: skip
    constants = {
        "sizes": np.array(attention.SIZES, np.int64), "starts": np.array([0, 96, 120], np.int64),
        "split": np.array([0, 0, heads, levels, points], np.int64),
    }  # fmt: skip
    nodes = [
        helper.make_node("Sigmoid", ["offsets"], ["locations"]),
        helper.make_node("Softmax", ["logits"], ["weights"], axis=-1),
        helper.make_node("Reshape", ["weights", "split"], ["split weights"]),
        helper.make_node(op_type, ["value", "sizes", "starts", "locations", "split weights"], ["sampled"], "plugin"),
        helper.make_node("Relu", ["sampled"], ["output"]),
    ]
    last = [batch, 10, heads, channels] if plugins.PLUGINS[op_type] else [batch, 10, heads * channels]
    graph = helper.make_graph(
        nodes, "plugin",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, last)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize("op_type", plugins.PLUGINS)
@pytest.mark.parametrize("how", ["op", "gather"])
def test_plugin_nodes(op_type, how, tmp_path):
    onnx.save(plugin_model(op_type), tmp_path / "plugin.onnx")
    if how == "gather":  # whose operators are newer than the file's opset
        with pytest.raises(CheckFailed, match="opset 13"):
            ld.fuse_onnx(tmp_path / "plugin.onnx", tmp_path / "fused.onnx", how)
        return
    report = ld.fuse_onnx(tmp_path / "plugin.onnx", tmp_path / "fused.onnx", how)
    assert report.verdict.status == VERIFIED, report.verdict
    assert report.regions[0]["form"] == "absolute locations, logits"
    assert report.repairs == ["1 plugin node, which no runtime here runs, in standard operators"]
    assert "against the definition of its plugins" in str(report.verdict)
    random = np.random.default_rng(0)
    session = ld.create_session(report.path)
    feed = {value.name: random.standard_normal(value.shape).astype(np.float32) for value in session.get_inputs()}
    (found,) = session.run(None, feed)
    inputs = {name: torch.from_numpy(array).double() for name, array in feed.items()}
    boxes = torch.tensor([0.0, 0.0, 8.0, 8.0]).double().expand(2, 10, 3, 4)  # offsets of which are locations
    wanted = reference.ms_deform_attn(
        inputs["logits"].flatten(2), inputs["value"].flatten(2), boxes, inputs["offsets"].sigmoid().flatten(2),
        torch.tensor(attention.SIZES), num_heads=4, num_points=4,
    ).relu()  # fmt: skip
    assert np.abs(found.reshape(wanted.shape) - wanted.numpy()).max() < 1e-5


def test_three_dimensions(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("GridSample", ["volume", "grid"], ["output"], "samples in space")], "volume",
        [helper.make_tensor_value_info("volume", TensorProto.FLOAT, [1, 2, 3, 4, 5]),
         helper.make_tensor_value_info("grid", TensorProto.FLOAT, [1, 2, 2, 2, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 2, 2, 2, 2])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "a.onnx")
    with pytest.raises(CheckFailed, match="'samples in space': it samples maps of 3 dimensions"):
        ld.fuse_onnx(tmp_path / "a.onnx", tmp_path / "fused.onnx")


def save_convolution(path, op_type: str, *more: str):
    inputs = {"images": [1, 3, 8, 8], "offsets": [1, 2, 8, 8]}
    graph = helper.make_graph(
        [helper.make_node(op_type, ["images", "weight", *more], ["output"], "convolution")], "convolution",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, inputs[name]) for name in ("images", *more)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 2, 8, 8])],
        [onnx.numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), "weight")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    return path


def test_deformable_convolution(tmp_path):
    path = save_convolution(tmp_path / "a.onnx", "DeformConv", "offsets")
    with pytest.raises(CheckFailed, match="'convolution': deformable convolutions, which the op does not compute"):
        ld.fuse_onnx(path, tmp_path / "fused.onnx")


def test_no_deformable_attention(tmp_path):
    path = save_convolution(tmp_path / "a.onnx", "Conv")
    with pytest.raises(CheckFailed, match="no deformable attention that this command knows.*no GridSample among its 1"):
        ld.fuse_onnx(path, tmp_path / "fused.onnx")


def test_fused_already(tmp_path):
    fused = ld.fuse_onnx(attention.export(tmp_path / "original.onnx"), tmp_path / "fused.onnx").path
    with pytest.raises(LiteDetrError, match="is fused already: it holds 1 attention op"):
        ld.fuse_onnx(fused, tmp_path / "again.onnx")


def test_damaged(tmp_path):
    original = attention.export(tmp_path / "original.onnx")
    (tmp_path / "cut.onnx").write_bytes(original.read_bytes()[:-5000])
    with pytest.raises(LiteDetrError, match="damaged"):
        ld.fuse_onnx(tmp_path / "cut.onnx", tmp_path / "fused.onnx")


def test_what_the_runtime_does_not_load(tmp_path):
    original = attention.export(tmp_path / "original.onnx")
    model = onnx.load(original)
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, original)
    with pytest.raises(LiteDetrError, match="cannot be loaded by ONNX Runtime.*NoSuchOperator"):
        ld.fuse_onnx(original, tmp_path / "fused.onnx")


def test_repairs(tmp_path):
    """Grids in float64, as TorchScript leaves them, and EyeLike of bool have no kernels."""
    original = attention.export(tmp_path / "original.onnx")
    model = onnx.load(original)
    eye = helper.make_node("EyeLike", ["square"], ["eye"], "eye", dtype=TensorProto.BOOL)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((3, 3), np.float32), "square"))
    model.graph.output.append(helper.make_tensor_value_info("eye", TensorProto.BOOL, [3, 3]))
    nodes = [eye]
    for node in model.graph.node:
        if node.op_type == "GridSample":
            for i in (0, 1):
                nodes.append(
                    helper.make_node("Cast", [node.input[i]], [f"{node.input[i]} wide"], to=TensorProto.DOUBLE)
                )
                node.input[i] += " wide"
            narrow = helper.make_node("Cast", [f"{node.output[0]} wide"], [node.output[0]], to=TensorProto.FLOAT)
            node.output[0] += " wide"
            nodes += [node, narrow]
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, original)
    report = ld.fuse_onnx(original, tmp_path / "fused.onnx")
    assert report.verdict.status == VERIFIED
    assert report.repairs == ["1 EyeLike of type bool made as int64", "float64 made float32"]


def test_bad_attention(tmp_path):
    with pytest.raises(LiteDetrError, match="'gatter'.*Did you mean 'gather'"):
        ld.fuse_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", attention="gatter")
