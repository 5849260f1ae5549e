import json

import numpy as np
import pytest
from PIL import Image

from ..runtime.tiny_artifact import save_detector


@pytest.fixture
def model(tmp_path):
    return save_detector(tmp_path / "model.onnx")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.jpg", "b.png"):
        Image.fromarray(np.full((100, 200, 3), 102, np.uint8)).save(folder / name)
    return folder


def test_directory_to_directory(litedetr, model, pictures, tmp_path):
    done = litedetr("predict", model, pictures, "-o", tmp_path / "new" / "out")
    assert done.exit_code == 0 and done.stderr == ""
    first, second, summary = done.stdout.splitlines()
    assert f"{pictures / 'a.jpg'}: 2 objects: dog 0.90, person 0.40" in first
    assert summary.startswith("2 images, median ")
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ["a.jpg", "b.png"]
    assert np.asarray(Image.open(tmp_path / "new" / "out" / "b.png")).std() > 0


def test_in_openvino_several_at_a_time(litedetr, model, pictures, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (pictures / "b-bad.png").write_bytes(b"nothing")
    wanted, done = (litedetr("predict", model, pictures, "--runtime", name) for name in ("onnxruntime", "openvino"))
    assert done.exit_code == 2 and "b-bad.png" in done.stderr

    def found(lines):
        return [line.rpartition(" (")[0] for line in lines.splitlines()[:-1]]

    assert found(done.stdout) == found(wanted.stdout) and len(found(done.stdout)) == 2
    assert "images/s, several at a time" in done.stdout.splitlines()[-1]


def test_one_picture_to_a_file_and_json(litedetr, model, pictures, tmp_path):
    done = litedetr("predict", model, pictures / "a.jpg", "-o", tmp_path / "out.png", "--json", "--threshold", "0.5")
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    [image] = report["images"]
    assert image["size"] == [200, 100] and image["saved"] == str(tmp_path / "out.png")
    [detection] = image["detections"]
    assert detection["label"] == 18 and detection["name"] == "dog"
    assert detection["box"] == pytest.approx([50, 25, 150, 50])
    assert Image.open(tmp_path / "out.png").size == (200, 100)


def test_nothing_is_written_without_output(litedetr, model, pictures, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert litedetr("predict", model, pictures).exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_pictures_of_one_name(litedetr, model, pictures, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (20, 10)).save(other / "a.jpg")
    assert litedetr("predict", model, pictures, other, "-o", tmp_path / "out").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a-2.jpg", "a.jpg", "b.png"]


def test_a_bad_picture_is_named_and_the_others_are_done(litedetr, model, pictures, tmp_path):
    (pictures / "aa.jpg").write_text("not a picture")
    done = litedetr("predict", model, pictures, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ") and str(pictures / "aa.jpg") in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jpg", "b.png"]
    assert len(json.loads(done.stdout)["errors"]) == 1


def test_bad_pictures_alone_leave_nothing(litedetr, model, tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture")
    done = litedetr("predict", model, tmp_path / "text.jpg", "-o", tmp_path / "out")
    assert done.exit_code == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"text", b""])
def test_corrupt_model(litedetr, pictures, tmp_path, content):
    (tmp_path / "bad.onnx").write_bytes(content)
    done = litedetr("predict", tmp_path / "bad.onnx", pictures, "-o", tmp_path / "out")
    assert done.exit_code == 2 and done.stdout == ""
    assert "bad.onnx is not an ONNX model" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_images_are_never_overwritten(litedetr, model, pictures):
    before = (pictures / "a.jpg").read_bytes()
    done = litedetr("predict", model, pictures, "-o", pictures)
    assert done.exit_code == 2 and "one of the images itself" in done.stderr
    assert (pictures / "a.jpg").read_bytes() == before


def test_other_wrong_uses(litedetr, model, pictures, tmp_path):
    for arguments, message in (
        ((model, tmp_path / "gone.jpg"), "does not exist"),
        ((tmp_path / "gone.onnx", pictures), "does not exist"),
        ((model, pictures, "-o", tmp_path / "one.png"), "Give a directory"),
        ((model, pictures, "-o", model / "out"), "not a directory"),
        ((model, pictures, "--resize", "letterbox"), "--pixel-mask"),
        ((model, pictures, "--threshold", "2"), "threshold"),
        ((model,), "images"),
    ):
        done = litedetr("predict", *arguments)
        assert done.exit_code == 2, arguments
        assert message in done.stderr.lower() or message in done.stderr, done.stderr
