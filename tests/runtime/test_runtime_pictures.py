"""Images out: drawing and saving."""

import os

import numpy as np
import pytest
from PIL import Image

from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.runtime.detector import Detections
from litedetr_deploy.runtime.draw import class_colour, draw, save


def detections(boxes, names=None):
    count = len(boxes)
    return Detections(np.arange(count), np.array(boxes, np.float32).reshape(-1, 4), np.linspace(0.9, 0.3, count), names)


@pytest.mark.parametrize("size", [(1, 1), (12, 9), (640, 480), (3000, 500)])
def test_draw_at_any_size(size):
    width, height = size
    found = detections(
        [[0.2 * width, 0.3 * height, 0.7 * width, 0.9 * height], [-50, -50, width + 50, height + 50]],
        ["hippopotamus", "dog"],
    )
    original = Image.new("RGB", size, (128, 128, 128))
    drawn = draw(original, found)
    assert drawn.size == size and drawn.mode == "RGB"
    assert np.asarray(drawn).std() > 0
    assert np.asarray(original).std() == 0  # untouched


def test_draw_ignores_what_cannot_be_drawn():
    original = Image.new("RGB", (100, 80), (128, 128, 128))
    found = detections(
        [[np.nan, 0, 10, 10], [0, 0, np.inf, 10], [200, 10, 300, 20], [-20, -20, -5, -5], [50, 9, 40, 20]]
    )
    np.testing.assert_array_equal(np.asarray(draw(original, found)), np.asarray(original))
    np.testing.assert_array_equal(np.asarray(draw(original, detections([]))), np.asarray(original))


def test_box_and_colour_are_where_they_belong():
    drawn = draw(Image.new("RGB", (400, 300)), detections([[100, 150, 300, 250]]))
    assert drawn.getpixel((300, 200)) == drawn.getpixel((200, 250)) == class_colour(0)
    assert drawn.getpixel((200, 200)) == (0, 0, 0)
    assert np.asarray(drawn)[:149, 99:].any()  # the label above the box


def test_colours_differ():
    colours = np.array([class_colour(label) for label in range(91)])
    assert len(np.unique(colours, axis=0)) == 91
    assert np.abs(np.diff(colours, axis=0)).max(axis=1).min() > 60


def test_save_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    save(Image.new("RGB", (10, 10)), path)
    assert Image.open(path).format == "JPEG"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    before = path.read_bytes()

    def interrupted(self, file, **options):
        file.write_bytes(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(Image.new("RGB", (10, 10)), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.jpg"]


def test_save_errors(tmp_path):
    with pytest.raises(LiteDetrError, match="no image format"):
        save(Image.new("RGB", (4, 4)), tmp_path / "a.onnx")
    with pytest.raises(LiteDetrError, match="cannot be written"):
        save(Image.new("RGB", (4, 4)), tmp_path / "gone" / "a.png")
