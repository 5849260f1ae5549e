"""What must not be called verified: each of these was, once."""

import json

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

import litedetr_deploy as ld
from litedetr_deploy import cli
from litedetr_deploy.artifact import CANNOT_TELL, FAILED, VERIFIED, distrust, is_sealed, load_onnx, onnx_metadata
from litedetr_deploy.errors import CheckFailed
from litedetr_deploy.verify.verdict import Verdict

SIZE = (128, 160)
ATTENTION = "decoder.layers.0.cross_attn"


def make_model():
    """A light detector with random weights, always the same."""
    torch.manual_seed(0)
    return ld.load_model(variant="lite-dino-r26n", decoder_layers=1, num_queries=50, num_classes=10)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    return path, ld.export_onnx(make_model(), path, image_size=SIZE)


def filled(key, value, index=None):
    """The model with `value` in one weight."""
    model = make_model()
    weight = model.state_dict()[key]
    weight.view(-1)[slice(None) if index is None else index] = value
    return model


def changed(path, target, name, change):
    """Save the model in `path` to `target` with another weight."""
    proto = onnx.load(path)
    [weight] = [tensor for tensor in proto.graph.initializer if tensor.name == name]
    weight.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(weight)), name))
    onnx.save(proto, target)
    return target


@pytest.mark.parametrize(
    "key, value, official, kind",
    [
        ("class_embed.bias", np.inf, "class_embed.0.bias", "an infinity in 1 of 10 values"),
        ("encoder.layers.1.linear1.weight", np.nan, "transformer.encoder.layers.1.linear1.weight", "NaN in 1 of"),
        ("backbone.bn1.running_var", -np.inf, "backbone.0.body.bn1.running_var", "an infinity in 1 of"),
    ],
)
def test_weights_that_are_not_finite(exported, tmp_path, key, value, official, kind):
    model = filled(key, value, 3)
    with pytest.raises(CheckFailed, match=f"{official} holds {kind}"):
        ld.export_onnx(model, tmp_path / "model.onnx", image_size=SIZE)
    assert not list(tmp_path.iterdir())
    verdict = ld.verify(exported[0], model)
    assert verdict.status == FAILED and f"{official}: holds {kind}" in str(verdict)
    assert "in the checkpoint itself" in verdict.why
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_finite_weights_whose_outputs_are_not(exported, tmp_path):
    huge = 3e38
    path = changed(exported[0], tmp_path / "m.onnx", "detector.class_embed.weight", lambda w: np.full_like(w, huge))
    verdict = ld.verify(path, filled("class_embed.weight", huge))
    assert verdict.status == FAILED and "in PyTorch as well" in verdict.why and "logits" in verdict.why
    json.dumps(verdict.to_dict(), allow_nan=False)
    verdict = ld.verify(path, make_model())
    assert "in the artifact only" in verdict.why


def test_a_tolerance_is_finite():
    with pytest.raises(ValueError, match="must be finite"):
        Verdict().add("image 1", "logits", 0.0, np.inf)


def test_weights_that_are_no_float32(tmp_path):
    model = make_model()
    model.class_embed.weight = torch.nn.Parameter(model.class_embed.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ld.LiteDetrError, match="class_embed.0.weight is of type int8; it must be float32"):
        ld.export_onnx(model, tmp_path / "model.onnx", image_size=SIZE)
    assert not list(tmp_path.iterdir())


def test_int8_tensors_in_a_checkpoint_are_refused_before_the_export(tmp_path):
    ld.save_checkpoint(make_model(), tmp_path / "weights.pth")
    contents = torch.load(tmp_path / "weights.pth", weights_only=True)
    contents["model"] = {key: (tensor * 50).to(torch.int8) for key, tensor in contents["model"].items()}
    torch.save(contents, tmp_path / "weights.pth")
    options = ["-o", str(tmp_path / "model.onnx"), "--image-size", "128x160"]
    result = CliRunner().invoke(cli.app, ["export", str(tmp_path / "weights.pth"), *options])
    assert result.exit_code == 2 and "int8" in result.stderr and "likely a bug" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


def test_random_weights_are_verified_by_their_attentions(exported):
    _, report = exported
    assert report.verdict.status == VERIFIED, str(report.verdict)
    alone = [row for row in report.verdict.rows if "attention alone" in row.case]
    assert [row.quantity for row in alone] == [*(f"encoder.layers.{i}.self_attn" for i in range(6)), ATTENTION]
    assert all(row.tolerance < 1e-5 for row in alone)


def test_one_attention_that_is_off_by_one_percent(exported, tmp_path):
    """The final outputs of random weights do not show it."""
    name = f"detector.{ATTENTION}.sampling_offsets.weight"
    path = changed(exported[0], tmp_path / "model.onnx", name, lambda weight: weight * np.float32(1.01))
    verdict = ld.verify(path, make_model())
    assert verdict.status == FAILED and [row.quantity for row in verdict.rows if not row.passed] == [ATTENTION]


def test_what_cannot_tell_is_not_called_verified(tmp_path):
    model = make_model()
    for tensor in model.state_dict().values():
        tensor.zero_()
    model.forced_variant = "the file's arguments say enc_scale 2"
    path = tmp_path / "model.onnx"
    report = ld.export_onnx(model, path, image_size=SIZE)
    assert report.verdict.status == CANNOT_TELL and not report.passed
    assert "off by 1 %" in str(report.verdict) and "(7 of 7 attentions)" in str(report.verdict)
    metadata = onnx_metadata(load_onnx(path), path)
    assert "cannot tell right from wrong" in distrust(path, metadata)
    assert metadata["forced_variant"] == "the file's arguments say enc_scale 2"


def test_a_variant_that_the_checkpoint_contradicts(tmp_path):
    options = ["-o", str(tmp_path / "model.onnx"), "--variant", "lite-dino-r26n-h2l2-2+1x3"]
    result = CliRunner().invoke(cli.app, ["export", "lite-dino-shapes", *options])
    assert result.exit_code == 2 and "--force-variant" in result.stderr and not list(tmp_path.iterdir())
    assert ld.load_model("lite-dino-shapes", "lite-dino-r26n-h2l2-2+1x3", force_variant=True).forced_variant


def test_a_file_that_was_rewritten(exported, tmp_path):
    path, report = exported
    metadata = onnx_metadata(load_onnx(path), path)
    assert distrust(path, metadata) == "" and metadata["verification"] == report.verdict.summary()

    contents = bytearray(path.read_bytes())
    [weight] = [t for t in onnx.load(path).graph.initializer if t.name == "detector.class_embed.bias"]
    place = contents.index(weight.raw_data)
    contents[place] ^= 1
    (tmp_path / "bit.onnx").write_bytes(contents)
    saved = onnx.load(path)
    saved.doc_string = "tidied"
    onnx.save(saved, tmp_path / "saved.onnx")
    for name in ("bit.onnx", "saved.onnx"):
        rewritten = tmp_path / name
        assert not is_sealed(rewritten)
        assert "rewritten after it was verified" in distrust(rewritten, onnx_metadata(load_onnx(rewritten), name))


def test_a_size_that_no_memory_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("litedetr_deploy.export.export._trace", None)  # refused before anything is traced
    with pytest.raises(ld.LiteDetrError, match="16,777,216 are supported"):
        ld.export_onnx(make_model(), tmp_path / "model.onnx", image_size=(100_000, 100_000))


def test_the_command_says_one_line(exported, tmp_path):
    ld.save_checkpoint(make_model(), tmp_path / "weights.pth")
    arguments = ["verify", str(exported[0]), str(tmp_path / "weights.pth")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.stderr
    [line] = result.stdout.splitlines()
    assert line.startswith("verified against PyTorch; the worst figure is")
    wrong = changed(exported[0], tmp_path / "wrong.onnx", "detector.class_embed.bias", lambda bias: bias + 1)
    result = CliRunner().invoke(cli.app, ["verify", str(wrong), str(tmp_path / "weights.pth"), "--json"])
    assert result.exit_code == 1 and json.loads(result.stdout)["verdict"] == FAILED


def test_in_openvino(exported, tmp_path):
    pytest.importorskip("openvino")
    verdict = ld.verify(exported[0], make_model(), runtime="openvino")
    assert verdict.status == VERIFIED and verdict.ran == "the model in OpenVINO"
    assert "OpenVINO against float64" in {row.quantity for row in verdict.rows}
    name = f"detector.{ATTENTION}.sampling_offsets.bias"
    path = changed(exported[0], tmp_path / "m.onnx", name, lambda bias: bias * 1.01)
    verdict = ld.verify(path, make_model(), runtime="openvino")
    assert verdict.status == FAILED and ATTENTION in verdict.why
