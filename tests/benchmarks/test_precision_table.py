"""`litedetr benchmark precision`: what is in its table, on a small detector with random weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import litedetr_deploy as ld
from litedetr_deploy import cli
from litedetr_deploy.artifact import METADATA_KEY
from litedetr_deploy.assets.shapes import CLASS_NAMES
from litedetr_deploy.model.checkpoints.official import official_key

SMALL = {"encoder_layers": 4, "num_expansion": 2, "decoder_layers": 1, "num_classes": len(CLASS_NAMES)}


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = ld.load_model(variant="lite-dino-r26n", **SMALL)
    path = tmp_path / "small.safetensors"
    arguments = {"enc_scale": model.config.enc_scale, "num_expansion": 2, "class_names": CLASS_NAMES}
    tensors = {official_key(key): value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, path, {METADATA_KEY: json.dumps(arguments)})
    return path


@pytest.mark.slow
def test_the_table(checkpoint, tmp_path):
    output = tmp_path / "precision"
    result = CliRunner().invoke(cli.app, [
        "benchmark", "precision", str(checkpoint), "--count", "2", "--precisions", "fp32,bf16,int8-cpu",
        "--attentions", "op",
        "--seconds", "0", "--models", str(tmp_path / "models"), "--output", str(output),
    ])  # fmt: skip
    assert result.exit_code == 1, result.output
    contents = json.loads((tmp_path / "precision.json").read_text())
    rows = {(row["precision"], row["runtime"]): row for row in contents["rows"] if row["runtime"] != "openvino bf16"}
    assert set(rows) == {
        ("fp32", "onnxruntime"), ("fp32", "openvino"), ("bf16", "onnxruntime"), ("int8-cpu", "onnxruntime"),
        ("int8-cpu", "openvino"),
    }  # fmt: skip
    fp32, bf16, int8 = rows["fp32", "onnxruntime"], rows["bf16", "onnxruntime"], rows["int8-cpu", "openvino"]
    assert int8["nodes"]["int8"] > 0 == int8["nodes"]["half"] and int8["median"] > 0
    assert (tmp_path / "models" / "op-fp32.onnx").stat().st_size == fp32["size_bytes"] > bf16["size_bytes"]
    assert fp32["nodes"]["half"] == 0 < bf16["nodes"]["half"]
    assert (fp32["verdict"], bf16["verdict"]) == ("verified", "cannot tell"), (
        bf16
    )  # random weights, and half of the bits
    assert fp32["ap"] == pytest.approx(contents["pytorch"]["metrics"]["AP"] - fp32["ap_lost"], abs=1e-12)
    assert fp32["median"] > 0 and bf16["median"] is None  # there are no kernels to time
    assert "| op        |      fp32 | onnxruntime |" in (tmp_path / "precision.md").read_text()


@pytest.mark.parametrize(
    "options,says",
    [
        (["--precisions", "fp8"], "precision is 'fp8'"),
        (["--attentions", "gridsample"], "precision is 'bf16' and attention 'gridsample'"),
        (["--image-size", "dynamic"], "it must be known"),
        (["--data", "coco"], "INT8 needs images"),
        (["--threads", "100000"], "--threads is 100000"),
        (["--output", "nowhere/precision"], "nowhere does not exist"),
    ],
)
def test_wrong_use(options, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["benchmark", "precision", *options])
    assert result.exit_code == 2 and says in result.stderr
    assert not list(tmp_path.iterdir())
