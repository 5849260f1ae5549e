import json

import numpy as np
import pytest

from ..evaluate.test_evaluate import Interruption, write_coco
from ..runtime.tiny_artifact import NAMES, save_raw_detector

pytest.importorskip("pycocotools")

LOGITS = np.full((2, len(NAMES)), -9, np.float32)
LOGITS[0, 1], LOGITS[1, 18] = 3, 2  # a person, a dog
BOXES = np.array([[0.3, 0.3, 0.4, 0.4], [0.6, 0.6, 0.6, 0.4]], np.float32)  # centre, width and height


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    return save_raw_detector(tmp_path / "model.onnx", LOGITS, BOXES)


@pytest.fixture
def shifted(tmp_path):
    return save_raw_detector(tmp_path / "shifted.onnx", LOGITS, BOXES + np.array([0.02, 0, 0, 0], np.float32))


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / "data", [[(1, [10, 10, 40, 40]), (18, [30, 40, 60, 40])]] * 3)


def test_report(litedetr, model, coco, tmp_path):
    done = litedetr("evaluate", model, "--data", coco, "-o", tmp_path / "report.json", "--batch-size", 2)
    assert done.exit_code == 0, done.stderr
    assert "AP50" in done.stdout and "1.000" in done.stdout
    assert "3 images with 6 objects, done in" in done.stdout.splitlines()[-1]
    assert f"evaluate {model}" in done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"]["AP"] == pytest.approx(1) and report["metrics"]["AP_small"] is None
    assert report["artifact"] == str(model) and report["image_size"] == [64, 96] and report["batch_size"] == 2
    as_json = litedetr("evaluate", model, "--data", coco, "--batch-size", 2, "--json", "--count", 2)
    assert json.loads(as_json.stdout)["images"] == 2


def test_against_a_shifted_one(litedetr, model, shifted, coco):
    done = litedetr("evaluate", model, "--data", coco, "--against", shifted)
    assert done.exit_code == 0, done.stderr
    assert "6 match (same label, IoU 0.5 or more); unmatched: 0 of" in done.stdout
    assert "score 0.05 or more" in done.stdout and "by 2 pixels in the mean and 2 at most" in done.stdout
    done = litedetr("evaluate", model, "--data", coco, "--against", shifted, "--tolerance", 0.01, "--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 1 and report["comparison"]["passed"] is False
    # The person's IoU is 38 / 42, the dog's 58 / 62: both above 0.9 and below 0.95, so that 9 of 10 thresholds hold.
    assert report["comparison"]["ap_difference"] == pytest.approx(-0.1)
    done = litedetr("evaluate", model, "--data", coco, "--against", shifted, "--tolerance", 0.11)
    assert done.exit_code == 0 and "agree within 0.11" in done.stdout
    done = litedetr("evaluate", model, "--data", coco, "--against", shifted, "--tolerance", 0.09)
    assert done.exit_code == 1 and "CHECK FAILED" in done.stdout


def test_interrupted_and_continued(litedetr, model, coco):
    with pytest.MonkeyPatch.context() as patch:
        Interruption(patch, at=1)
        done = litedetr("evaluate", model, "--data", coco)
    assert done.exit_code == 130 and done.stdout == ""
    assert "interrupted; 1 of 3 images are done and kept in" in done.stderr
    done = litedetr("evaluate", model, "--data", coco, "--json")
    assert "continued: 1 of 3 images were done before" in done.stderr
    assert json.loads(done.stdout)["continued"] == 1


def test_wrong_uses(litedetr, model, coco, tmp_path):
    save_raw_detector(tmp_path / "fewer.onnx", LOGITS[:, :18], BOXES, class_names=NAMES[:18])
    for arguments, message in (
        ((model,), "--shapes"),
        ((model, "--data", coco, "--shapes"), "either --shapes, or --data"),
        ((model, "--shapes", "--images", coco), "need none"),
        ((model, "--data", coco, "--tolerance", 0.1), "--against"),
        ((model, "--data", coco, "--image-size", "big"), "HEIGHTxWIDTH"),
        ((model, "--data", coco, "--image-size", "64x64"), "fixed at 64x96"),
        ((model, "--data", coco, "--resize", "letterbox"), "--pixel-mask"),
        ((model, "--data", coco, "--provider", "Gone"), "'Gone'"),
        ((model, "--data", coco, "-o", tmp_path / "gone" / "report.json"), "does not exist"),
        ((model, "--data", tmp_path / "gone"), "does not exist"),
        ((tmp_path / "gone.onnx", "--data", coco), "does not exist"),
        ((tmp_path / "fewer.onnx", "--data", coco), "does not know the category 18, 'dog'"),
    ):
        done = litedetr("evaluate", *arguments)
        assert done.exit_code == 2 and done.stdout == "", arguments
        [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert message in line, line
        assert done.stderr.endswith(line + "\n")
