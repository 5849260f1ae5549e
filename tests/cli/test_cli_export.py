"""`litedetr export` and `litedetr verify` around stand-ins for the model and the exporter."""

import inspect
import json

import pytest
from PIL import Image
from typer.testing import CliRunner

import litedetr_deploy as ld
from litedetr_deploy import cli
from litedetr_deploy.errors import Notice
from litedetr_deploy.export.export import ExportReport
from litedetr_deploy.export.limits import Int8
from litedetr_deploy.verify.verdict import Verdict

FINE = Verdict()
FINE.add("image 1", "logits", 2e-5, 1e-3)
FINE.add("image 1", "boxes", 3e-6, 1e-4)
WRONG = Verdict(rows=[*FINE.rows])
WRONG.add("batch of 3", "logits", 0.5, 1e-3)
SKIPPED = Verdict(skipped="it was not asked for")
METADATA = {"precision": "int8", "int8_left_out": ["detector.backbone.conv1/Conv"]}
NODES = {"int8": 30, "half": 20, "float": 10, "casts": 5}


def report(verdict):
    return ExportReport("model.onnx", 188_400_000, 41.2, 12, NODES, METADATA, verdict)


@pytest.fixture
def export(monkeypatch, tmp_path):
    """Call `litedetr export` on an exporter that reports `verdict`; returns the result and the exporter's arguments."""
    checkpoint = tmp_path / "weights.pth"
    checkpoint.write_bytes(b"weights")
    signature = inspect.signature(ld.export_onnx)

    def run(verdict, *options):
        calls = {}

        def export_onnx(*arguments, progress, **named):
            progress("trace")
            progress("verify [batch 1]")
            calls.update(signature.bind(*arguments, **named).arguments)
            return report(verdict)

        monkeypatch.setitem(vars(ld), "load_model", lambda *arguments: arguments)
        monkeypatch.setitem(vars(ld), "export_onnx", export_onnx)
        arguments = ["export", str(checkpoint), "-o", str(tmp_path / "model.onnx"), *options]
        return CliRunner().invoke(cli.app, arguments), calls

    return run


def test_arguments_reach_the_exporter(export, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    result, calls = export(
        FINE,
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
        "--target",
        "cpu",
    )
    assert result.exit_code == 0, result.stderr
    assert "int8: 30 nodes in INT8, 20 in half, 10 in FP32; 5 casts" in result.stdout
    assert "left out of INT8 for the AP budget: detector.backbone.conv1/Conv" in result.stdout
    assert calls == {
        "model": (str(tmp_path / "weights.pth"), "lite-dino-r50-h3l1-2+1x3", False),
        "path": tmp_path / "model.onnx",
        "attention": "gather",
        "precision": "int8",
        "image_size": (640, 512),
        "outputs": "raw",
        "pixel_mask": True,
        "opset": 18,
        "int8": Int8(tmp_path),
        "keep_fp32": ["detector.backbone"],
        "target": "cpu",
        "verify": True,
        "images": [tmp_path / "a.png"],
    }


def test_defaults(export):
    _, calls = export(FINE)
    assert (calls["attention"], calls["image_size"], calls["outputs"]) == ("op", (800, 1333), "detections")
    assert (calls["pixel_mask"], calls["opset"], calls["verify"], calls["images"]) == (False, 17, True, None)


def test_one_line_on_success_and_the_table_where_asked_for(export):
    result, _ = export(FINE)
    assert result.exit_code == 0
    assert "188.4 MB, 12 attention nodes, made in 41 s" in result.stdout
    *_, line = result.stdout.splitlines()
    assert line == "verified against PyTorch; the worst figure is 3% of its tolerance (image 1, boxes)"
    assert "2.0e-05" not in result.stdout and "verify [batch 1]" in result.stderr
    result, _ = export(FINE, "--verbose")
    assert "2.0e-05" in result.stdout and "FAILED" not in result.stdout


def test_failed_verification_exits_with_1_and_shows_the_table(export):
    result, _ = export(WRONG)
    assert result.exit_code == 1 and "2.0e-05" in result.stdout
    assert "VERIFICATION FAILED against PyTorch: batch of 3, logits: differs by 5.0e-01" in result.stdout


def test_what_cannot_be_told_exits_with_1(export):
    result, _ = export(Verdict(rows=[*FINE.rows], undecided="nothing moves"))
    assert result.exit_code == 1 and "CANNOT TELL whether it agrees with PyTorch: nothing moves" in result.stdout


def test_without_verification(export):
    result, calls = export(SKIPPED, "--no-verify", "--image-size", "dynamic")
    assert result.exit_code == 0 and "not verified" in result.stdout
    assert calls["verify"] is False and calls["image_size"] is None


def test_json_is_all_there_is_on_stdout(export):
    result, _ = export(WRONG, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["verdict"] == WRONG.to_dict()


def test_a_square_size(export):
    _, calls = export(FINE, "--image-size", "640")
    assert calls["image_size"] == (640, 640)


def test_a_size_that_no_memory_holds(export):
    result, calls = export(FINE, "--image-size", "100000x100000")
    assert result.exit_code == 2 and not calls
    assert "100000x100000, 10,000,000,000 pixels; 16,777,216 are supported" in result.stderr


def test_calibration_images_are_opened_before_anything_is_traced(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    arguments = ["export", "lite-dino-shapes", "-o", tmp_path / "model.onnx", "--image-size", "256"]
    arguments += ["--precision", "int8", "--calibration", tmp_path / "images"]
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 2 and "a.png is not an image" in result.stderr and "trace" not in result.stderr
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "a.png")
    with pytest.warns(Notice, match="a single image says little"):
        Int8(tmp_path / "images").chosen()
