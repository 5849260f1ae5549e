"""`litedetr_deploy.export.precision`: which node gets which type, what it costs, and what it saves."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import litedetr_deploy as ld
from litedetr_deploy.artifact import CANNOT_TELL, FAILED, METADATA_KEY
from litedetr_deploy.export import export, graph, precision
from litedetr_deploy.model.attention import DeformableAttention, SelfAttention
from litedetr_deploy.ops import onnx_schema, schema
from litedetr_deploy.verify import typed as typed_values
from litedetr_deploy.verify.onnx import verify_onnx

pytestmark = pytest.mark.xdist_group("export")
FLOAT, HALF, BFLOAT = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16
KINDS = {"fp16": HALF, "bf16": BFLOAT}
SIZE = (256, 256)


@functools.cache
def traced():
    """A light detector (encoder HFHF, two decoder layers), and its FP16 export: the folder that has it as model.onnx
    and, as it was before it was typed, as fp32.onnx; and the report.  One for two files of tests: it takes a while."""
    torch.manual_seed(0)
    model = ld.load_model(variant="lite-dino-r26n", encoder_layers=4, num_expansion=2, decoder_layers=2)
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    apply = precision.apply

    def save_and_apply(onnx_model, *arguments):
        ir.save(onnx_model, folder / "fp32.onnx")
        apply(onnx_model, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "apply", save_and_apply)
        report = ld.export_onnx(model, folder / "model.onnx", precision="fp16", image_size=SIZE)
    return model, folder, report


def typed(name, keep=(), change=lambda model: None):
    """The FP32 graph, changed and then typed."""
    model = ir.load(traced()[1] / "fp32.onnx")
    if name == "bf16":
        set_opset(model, 22)
    change(model)
    precision.apply(model, name, keep)
    return model


def set_opset(model, opset):
    """As `graph.finish` would have made it; only one operator differs."""
    for node in model.graph:
        if node.op_type == "ReduceMax" and "axes" in node.attributes:
            axes = np.array(node.attributes.pop("axes").as_ints())
            node.resize_inputs(2)
            node.replace_input_with(1, graph.constant(model.graph, "axes", axes))
    model.opset_imports[""] = opset


def save(model, name, path):
    """With the metadata of an export."""
    metadata = traced()[2].metadata | {"precision": name}
    model.metadata_props[METADATA_KEY] = json.dumps(metadata)
    ir.save(model, path)
    return path


def inferred(proto):
    """Nodes, and the type of every value by onnx's own inference, which also checks that no operator mixes types."""
    onnx_schema.register()
    proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    values = (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    kinds |= {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    return proto.graph.node, kinds


def run(proto, *names):
    """Outputs of an ONNX model, or of its values `names`, on noise."""
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    image = np.random.default_rng(0).random((1, 3, *SIZE), np.float32)
    feed = {"images": image, "orig_target_sizes": np.array([SIZE])}
    return ld.create_session(proto.SerializeToString()).run(list(names) or None, feed)


@pytest.mark.parametrize("name", KINDS)
def test_types(name):
    half = KINDS[name]
    nodes, kinds = inferred(ir.to_proto(typed(name)))
    assert all(output in kinds for node in nodes for output in node.output)
    assert {kinds[v] for v in ("images", "boxes", "scores", "pred_logits", "pred_boxes", "proposal_scores")} == {FLOAT}
    for node in nodes:
        types = [kinds[value] for value in node.input]
        if node.op_type in ("LayerNormalization", "InstanceNormalization", "Softmax", "Sin", "Log", "Sigmoid", "TopK"):
            assert types[0] == FLOAT, node.name
        if node.domain == schema.DOMAIN:
            assert types == [half, half, FLOAT, half, onnx.TensorProto.INT64], node.name
        if node.op_type == "Conv" or (".linear" in node.name and node.op_type == "MatMul"):
            assert types[:2] == [half, half], node.name
        if node.name.startswith(("detector.class_embed", "detector.bbox_embed", "detector.enc_out")):
            assert FLOAT in types and half not in types, node.name
    scores = [n for n in nodes if n.op_type == "MatMul" and n.name.endswith("self_attn/MatMul_2")]
    assert len(scores) == 2 and all(kinds[value] == FLOAT for node in scores for value in node.input)
    sums = {node.input[0] for node in nodes if node.op_type == "LayerNormalization"}
    residual = [node for node in nodes if node.op_type == "Add" and sums & set(node.output)]
    # Attentions and feed-forwards of the encoder, three a layer of the decoder, the bias in front of enc_output_norm.
    assert len(residual) == 4 + 6 + 6 + 1
    assert all(kinds[value] == FLOAT for node in residual for value in node.input)


def test_casts_are_few_and_shared():
    model = typed("fp16")
    casts = [node for node in model.graph if node.op_type == "Cast" and node.inputs[0].dtype.is_floating_point()]
    casts = [node for node in casts if node.outputs[0].dtype.is_floating_point()]
    assert precision.count(model)["casts"] == len(casts)
    # H and F layers of the encoder, decoder layers; the image, four maps, the memory, the first tokens.
    assert len(casts) <= 2 * 5 + 2 * 6 + 2 * 10 + 7
    assert not any(node.inputs[0].is_initializer() for node in casts)
    assert len({(node.inputs[0].name, node.outputs[0].dtype) for node in casts}) == len(casts)
    for node in casts:
        assert all(user.op_type != "Cast" for user, _ in node.outputs[0].uses())
    # A constant that is read in one type is stored in it, under its own name.
    assert all(value.uses() for value in model.graph.initializers.values())
    assert model.graph.initializers["detector.backbone.conv1.weight"].dtype == ir.DataType.FLOAT16
    assert model.graph.initializers["detector.encoder.layers.0.norm1.weight"].dtype == ir.DataType.FLOAT


def test_export_is_verified_and_says_its_types():
    _, folder, report = traced()
    assert report.verdict.passed, str(report.verdict)
    cases = {row.case for row in report.verdict.rows}
    assert {"attention op alone, float16", "image 1, all rounded", "image 1, attention alone, relative"} <= cases
    assert (
        report.metadata["precision"] == "fp16"
        and report.metadata["verification"]["ran"] == "the model and its float twin"
    )
    assert report.nodes == precision.count(ir.load(folder / "model.onnx"))
    assert report.nodes["half"] > 150 and report.nodes["int8"] == 0


def test_bfloat16_is_verified_by_its_twin(tmp_path):
    path = save(typed("bf16"), "bf16", tmp_path / "model.onnx")
    verdict = verify_onnx(path, traced()[0])
    assert verdict.ran == "the model's float twin" and all(row.passed for row in verdict.rows), str(verdict)
    # bfloat16 rounds by as much as one percent of these random weights' offsets moves.
    assert verdict.status == CANNOT_TELL


def test_verification_sees_a_wrong_matrix(tmp_path):
    def change(model):
        weight = model.graph.initializers["detector.encoder.layers.2.linear2.weight"]
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.1), name=weight.name)

    path = save(typed("fp16", change=change), "fp16", tmp_path / "model.onnx")
    assert verify_onnx(path, traced()[0]).status == FAILED


def test_the_twin_rounds_every_value():
    """2048 + 1 is 2048 in float16, whatever is done to the sum next."""
    values = {name: onnx.helper.make_tensor_value_info(name, FLOAT, [2]) for name in ("x", "z")}
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["h"], to=HALF),
        onnx.helper.make_node("Add", ["h", "one"], ["y"]),
        onnx.helper.make_node("Sub", ["y", "h"], ["d"]),
        onnx.helper.make_node("Cast", ["d"], ["z"], to=FLOAT),
    ]
    one = onnx.numpy_helper.from_array(np.ones(1, np.float16), "one")
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "rounding", [values["x"]], [values["z"]], [one]),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=10,
    )
    session = ld.create_session(typed_values.float_twin(proto).SerializeToString())
    assert session.run(None, {"x": np.array([2048, 4], np.float32)})[0].tolist() == [0, 1]


def overflowing(model):
    """After the first encoder layer tokens and branches come near the end of float16's range, 65504."""
    prefix = "detector.encoder.layers."

    def scale(name, factor):
        weight = model.graph.initializers[prefix + name]
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(factor), name=weight.name)

    scale("0.norm2.weight", 1e4)  # tokens up to about 4e4
    for name in ("sampling_offsets", "value_proj", "query_proj"):
        scale(f"1.self_attn.{name}.weight", 1e-4)
    bias = model.graph.initializers[f"{prefix}1.self_attn.output_proj.bias"]
    bias.const_value = ir.tensor(np.resize(np.float32([5e4, -5e4]), bias.shape[0]), name=bias.name)


PROBED = ("proposal_scores", "pred_logits", "pred_boxes")


def test_residual_sums_in_float_do_not_overflow(monkeypatch):
    wanted = ir.load(traced()[1] / "fp32.onnx")
    overflowing(wanted)
    wanted = run(ir.to_proto(wanted), *PROBED[:1])
    found = run(typed_values.float_twin(ir.to_proto(typed("fp16", change=overflowing))), *PROBED)
    assert all(np.isfinite(value).all() for value in found)
    assert np.abs(found[0] - wanted[0]).mean() < 2 * np.finfo(np.float16).eps * np.abs(wanted[0]).max()
    # The same with the sums in half, which pass its range.
    monkeypatch.setattr(precision, "_in_float", lambda graph, keep: precision.matching(graph, precision.ISLANDS))
    found = run(typed_values.float_twin(ir.to_proto(typed("fp16", change=overflowing))), *PROBED)
    assert not np.isfinite(found[0]).all()


def test_a_product_beyond_the_range_is_saved_by_keeping_its_layer_in_float():
    def change(model):
        weight = model.graph.initializers["detector.encoder.layers.2.linear2.weight"]
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1e6), name=weight.name)

    lost = run(typed_values.float_twin(ir.to_proto(typed("fp16", change=change))), *PROBED)
    assert not np.isfinite(lost[0]).all()
    kept = typed("fp16", ["detector.encoder.layers.2.linear2"], change)
    assert np.isfinite(run(typed_values.float_twin(ir.to_proto(kept)), *PROBED)[0]).all()


def test_a_constant_beyond_the_range_keeps_its_nodes_in_float():
    def change(model):
        weight = model.graph.initializers["detector.encoder.layers.2.linear2.weight"]
        weight.const_value = ir.tensor(np.full(weight.shape.numpy(), 1e5, np.float32), name=weight.name)

    assert typed("fp16", change=change).graph.initializers["detector.encoder.layers.2.linear2.weight"].dtype == 1


def test_what_is_kept():
    model = typed("fp16", ["detector.backbone.layer4", "*.linear1/MatMul"])
    weights = model.graph.initializers
    assert weights["detector.backbone.layer4.0.conv1.weight"].dtype == ir.DataType.FLOAT
    assert weights["detector.backbone.layer3.0.conv1.weight"].dtype == ir.DataType.FLOAT16
    assert weights["detector.encoder.layers.0.linear1.weight"].dtype == ir.DataType.FLOAT
    assert weights["detector.encoder.layers.0.linear1.bias"].dtype == ir.DataType.FLOAT16
    inferred(ir.to_proto(model))
    with pytest.raises(ld.LiteDetrError, match="'backbone' .* fits no node"):
        typed("fp16", ["backbone"])


def test_a_typed_graph_is_refused():
    with pytest.raises(ld.LiteDetrError, match="typed already: .*FLOAT16"):
        precision.apply(typed("fp16"), "fp16")


def test_bfloat16_and_gridsample(tmp_path):
    with pytest.raises(ld.LiteDetrError, match="opset 22"):
        ld.export_onnx(traced()[0], tmp_path / "model.onnx", precision="bf16", attention="gridsample")


class Part(nn.Module):
    """A part of a detector under the name that it has there."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.detector = nn.Module()
        self.detector.forward = lambda *inputs: self.detector.part(*inputs)
        self.detector.part = part

    def forward(self, *inputs):
        return {"output": self.detector(*inputs)}


def typed_part(part, inputs, attention="op"):
    """An FP16 graph of a part alone; its node names and types as `inferred` gives them; and what it computes, less what
    PyTorch does."""
    module = Part(part).eval()
    with torch.no_grad():
        wanted = module(*inputs)["output"].numpy()
        program = torch.export.export(module, inputs, strict=False)
    names = [f"input_{i}" for i in range(len(inputs))]
    model = export._translate(program, attention, names, ["output"])
    graph.finish(model, 17, ("output",))
    precision.apply(model, "fp16")
    proto = ir.to_proto(model)
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs)}
    feed = {value.name: feed[value.name] for value in proto.graph.input}
    found = ld.create_session(typed_values.float_twin(proto).SerializeToString()).run(None, feed)[0]
    return *inferred(proto), np.abs(found - wanted).max() / np.abs(wanted).max()


class Block(nn.Module):
    """A pre-norm block, such as Swin's."""

    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(2 * dim)
        self.attn = SelfAttention(dim, 2)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, bias):
        x = x + self.attn(self.norm1(x), self.norm1(x), bias)
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.norm3(x.unflatten(1, (-1, 2)).flatten(2))


def test_a_pre_norm_block():
    torch.manual_seed(0)
    nodes, kinds, error = typed_part(Block(32), (torch.randn(2, 6, 32), torch.randn(6, 6)))
    assert error < 16 * np.finfo(np.float16).eps
    own = [node for node in nodes if node.name.startswith("detector.part/")]  # of Block itself: GELU and sums
    (erf,) = [node.output[0] for node in own if node.op_type == "Erf"]
    gelu = [node for node in own if node.op_type in ("Erf", "Mul", "Div") or erf in node.input]
    assert {kinds[value] for node in gelu for value in (*node.input, *node.output)} == {HALF}
    residual = [node for node in own if node.op_type == "Add" and node not in gelu]
    assert len(residual) == 2 and {kinds[value] for node in residual for value in node.input} == {FLOAT}
    softmax = {node.input[0] for node in nodes if node.op_type == "Softmax"}
    (biased,) = [node for node in nodes if softmax & set(node.output)]
    assert biased.op_type == "Add" and {kinds[value] for value in biased.input} == {FLOAT}


@pytest.mark.parametrize("attention", ["gather", "gridsample"])
def test_attention_in_standard_ops(attention):
    torch.manual_seed(0)
    inputs = (torch.randn(2, 6, 32), torch.rand(2, 6, 2, 4), torch.randn(2, 100, 32), torch.tensor([[8, 10], [4, 5]]))
    nodes, kinds, error = typed_part(DeformableAttention(32, 4, 2, 2, key_aware=True), inputs, attention)
    assert error < 16 * np.finfo(np.float16).eps
    for node in nodes:
        if node.op_type in ("Softmax", "Floor", "Clip", "GridSample"):
            assert all(kinds[value] == FLOAT for value in node.input), node.name
    if attention == "gather":  # samples are gathered and multiplied in half
        gathered = [node.output[0] for node in nodes if node.op_type == "Gather" and kinds[node.output[0]] == HALF]
        products = [node for node in nodes if node.op_type == "MatMul" and set(gathered) & set(node.input)]
        assert len(gathered) == 1 and len(products) == 2
