"""`litedetr export` and `litedetr verify` around stand-ins for the model and the exporter."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

import litedetr_deploy as ld
from litedetr_deploy import cli

from ..runtime.tiny_artifact import save_detector

ROWS = [
    {"case": "sample, batch 1", "quantity": "logits", "difference": 2e-5, "tolerance": 1e-3, "passed": True},
    {"case": "sample, batch 1", "quantity": "boxes", "difference": 3e-6, "tolerance": 1e-4, "passed": True},
    {"case": "noise, batch 3", "quantity": "logits", "difference": 0.5, "tolerance": 1e-3, "passed": False},
]


class Report:
    def __init__(self, rows):
        self.rows = rows

    def to_dict(self):
        return {
            "path": "model.onnx",
            "size_bytes": 188_400_000,
            "seconds": 41.2,
            "attention_nodes": 12,
            "nodes": {"int8": 30, "half": 20, "float": 10, "casts": 5},
            "verification": self.rows,
            "sensitivity": [],
            "metadata": {"int8_left_out": ["detector.backbone.conv1/Conv"]},
            "passed": all(row["passed"] for row in self.rows),
        }


@pytest.fixture
def export(monkeypatch, tmp_path):
    """Call `litedetr export` on an exporter that reports `rows`; returns the result and the exporter's arguments."""
    checkpoint = tmp_path / "weights.pth"
    checkpoint.write_bytes(b"weights")

    def run(rows, *options):
        calls = {}

        def export_onnx(model, path, progress, **arguments):
            progress("trace")
            progress("verify [batch 1]")
            calls.update(arguments, model=model, path=path)
            return Report(rows)

        monkeypatch.setitem(vars(ld), "load_model", lambda path, variant: (path, variant))
        monkeypatch.setitem(vars(ld), "export_onnx", export_onnx)
        arguments = ["export", str(checkpoint), "-o", str(tmp_path / "model.onnx"), *options]
        return CliRunner().invoke(cli.app, arguments), calls

    return run


def test_arguments_reach_the_exporter(export, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    result, calls = export(
        ROWS[:2],
        "--variant",
        "lite-dino-r50-h3l1-2+1x3",
        "--attention",
        "gather",
        "--image-size",
        "640x512",
        "--outputs",
        "raw",
        "--pixel-mask",
        "--opset",
        "18",
        "--images",
        str(tmp_path),
        "--precision",
        "int8",
        "--calibration",
        str(tmp_path),
        "--keep-fp32",
        "detector.backbone",
    )
    assert result.exit_code == 0, result.stderr
    assert "int8: 30 nodes in INT8, 20 in half, 10 in FP32; 5 casts" in result.stdout
    assert "left out of INT8 for the AP budget: detector.backbone.conv1/Conv" in result.stdout
    assert calls == {
        "model": (str(tmp_path / "weights.pth"), "lite-dino-r50-h3l1-2+1x3"),
        "path": tmp_path / "model.onnx",
        "attention": "gather",
        "precision": "int8",
        "image_size": (640, 512),
        "outputs": "raw",
        "pixel_mask": True,
        "opset": 18,
        "calibration": [tmp_path / "a.png"],
        "calibration_images": None,
        "calibration_method": "percentile",
        "keep_fp32": ["detector.backbone"],
        "sensitivity": False,
        "ap_budget": None,
        "ap_data": None,
        "verify": True,
        "images": [tmp_path / "a.png"],
    }


def test_defaults(export):
    _, calls = export(ROWS[:2])
    assert (calls["attention"], calls["image_size"], calls["outputs"]) == ("op", (800, 1333), "detections")
    assert (calls["pixel_mask"], calls["opset"], calls["verify"], calls["images"]) == (False, 17, True, None)


def test_table_and_summary(export):
    result, _ = export(ROWS[:2])
    assert result.exit_code == 0
    assert "logits" in result.stdout and "2.0e-05" in result.stdout and "FAILED" not in result.stdout
    assert "188.4 MB, 12 attention nodes, made in 41 s; verified against PyTorch" in result.stdout
    assert "verify [batch 1]" in result.stderr


def test_failed_verification_exits_with_1(export):
    result, _ = export(ROWS)
    assert result.exit_code == 1 and "FAILED" in result.stdout


def test_without_verification(export):
    result, calls = export([], "--no-verify", "--image-size", "dynamic")
    assert result.exit_code == 0 and "not verified" in result.stdout
    assert calls["verify"] is False and calls["image_size"] is None


def test_json_is_all_there_is_on_stdout(export):
    result, _ = export(ROWS, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["verification"] == ROWS


def test_verify_takes_the_variant_from_the_model(monkeypatch, tmp_path):
    import sys
    import types

    model = save_detector(tmp_path / "model.onnx", variant="dino-r50")
    (tmp_path / "weights.pth").write_bytes(b"weights")
    calls = []
    stand_in = types.ModuleType("litedetr_deploy.verify.onnx")
    stand_in.verify_onnx = lambda *arguments, images, progress: calls.append((*arguments, images)) or Report(ROWS)
    monkeypatch.setitem(sys.modules, "litedetr_deploy.verify.onnx", stand_in)
    monkeypatch.setitem(vars(ld), "load_model", lambda path, variant: (path, variant))
    result = CliRunner().invoke(cli.app, ["verify", str(model), str(tmp_path / "weights.pth")])
    assert calls == [(model, (str(tmp_path / "weights.pth"), "dino-r50"), None)]
    assert result.exit_code == 1 and "DOES NOT AGREE" in result.stdout
