import warnings

import numpy as np
import pytest
from PIL import Image

import litedetr_deploy as ld
from litedetr_deploy.errors import Notice

from .tiny_artifact import BOXES, LABELS, save_detector, save_raw_detector


def grey(width, height, value=102):
    return np.full((height, width, 3), value, np.uint8)


def test_predict_gives_pixels_of_the_original_image(tmp_path):
    detector = ld.Detector(save_detector(tmp_path / "model.onnx"))
    [found] = detector.predict(grey(200, 100))
    np.testing.assert_array_equal(found.labels, LABELS)
    np.testing.assert_allclose(found.boxes, BOXES * [200, 100, 200, 100], rtol=1e-6)
    np.testing.assert_allclose(found.scores, [0.9, 0.4, 0], atol=1e-4)  # 102 / 255 = 0.4
    assert found.names == ["dog", "person", "class 95"]
    assert len(found) == 3


def test_every_kind_of_source_alone_and_in_a_list(tmp_path):
    detector = ld.Detector(save_detector(tmp_path / "model.onnx"))
    image = Image.fromarray(grey(20, 10))
    image.save(tmp_path / "a.png")
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), image, grey(20, 10)]
    assert len(detector.predict(sources)) == 4
    assert len(detector.predict(np.stack([grey(20, 10)] * 2))) == 2
    for source in sources:
        assert len(detector.predict(source)) == 1
    assert detector.predict([]) == []


@pytest.mark.parametrize("size", [(64, 96), None])
def test_batches_do_not_change_anything(tmp_path, size):
    detector = ld.Detector(save_detector(tmp_path / "model.onnx", size=size))
    images = [grey(40, 30, value) for value in (10, 20, 30)] + [grey(30, 40, value) for value in (40, 50)]
    one = detector.predict(images)
    three = detector.predict(images, batch_size=3)
    for a, b in zip(one, three, strict=True):
        np.testing.assert_allclose(a.boxes, b.boxes)
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5)


def test_stream_is_lazy(tmp_path):
    detector = ld.Detector(save_detector(tmp_path / "model.onnx"))

    def endless():
        while True:
            yield grey(20, 10)

    stream = detector.stream(endless(), threshold=0.5)
    assert [len(next(stream)) for _ in range(3)] == [1, 1, 1]


def test_letterbox_is_the_default_with_a_mask(tmp_path):
    detector = ld.Detector(save_detector(tmp_path / "model.onnx", size=(64, 96), pixel_mask=True))
    [found] = detector.predict(grey(40, 80))  # becomes 32 of 96 columns
    assert found.scores[2] == pytest.approx(2 / 3)
    np.testing.assert_allclose(found.boxes[1], [0, 0, 40, 80])
    [stretched] = detector.predict(grey(40, 80), resize="stretch")
    assert stretched.scores[2] == 0


@pytest.mark.parametrize(
    "options, resize, message",
    [
        ({}, "shortest_edge", r"fixed at 64x96"),
        ({}, "letterbox", "--pixel-mask"),
        ({"size": None}, "stretch", "dynamic"),
        ({}, "squeeze", "must be one of shortest_edge, stretch, letterbox"),
        ({}, "leterbox", "Did you mean 'letterbox'"),
    ],
)
def test_resize_that_the_model_cannot_take(tmp_path, options, resize, message):
    detector = ld.Detector(save_detector(tmp_path / "model.onnx", **options))
    with pytest.raises(ld.LiteDetrError, match=message):
        detector.predict(grey(20, 10), resize=resize)


def test_raw_outputs(tmp_path):
    logits = np.array([[-2, 2, -9], [1, -3, -4]], np.float32)
    boxes = np.array([[0.5, 0.5, 1, 1], [0.25, 0.5, 0.5, 1]], np.float32)
    path = save_raw_detector(tmp_path / "raw.onnx", logits, boxes, class_names=None)
    detector = ld.Detector(path, class_names=["a", "b", "c"])
    [found] = detector.predict(grey(200, 100), threshold=0.5)
    assert found.names == ["b", "a"]
    np.testing.assert_allclose(found.boxes, [[0, 0, 200, 100], [0, 0, 100, 100]], atol=1e-4)
    np.testing.assert_allclose(found.scores, 1 / (1 + np.exp([-2, -1])), rtol=1e-6)


def test_without_names(tmp_path):
    detector = ld.Detector(save_detector(tmp_path / "model.onnx", class_names=None))
    assert detector.predict(grey(20, 10))[0].names is None


def test_another_kind_of_model(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    with (
        pytest.warns(Notice, match="was not made by this package"),
        pytest.raises(ld.LiteDetrError, match=r"is no detector.*\['x'\].*Wanted: images"),
    ):
        ld.Detector(tmp_path / "m.onnx")


def test_boxes_are_clipped_to_the_image(tmp_path):
    logits, boxes = np.array([[2.0], [1.0]], np.float32), np.array([[0.0, 0.5, 1, 2], [0.9, 0.5, 0.4, 0.5]], np.float32)
    detector = ld.Detector(save_raw_detector(tmp_path / "raw.onnx", logits, boxes, class_names=["a"]))
    [found] = detector.predict(grey(200, 100))
    np.testing.assert_allclose(found.boxes, [[0, 0, 100, 100], [140, 25, 200, 75]], atol=1e-4)
    [official] = detector.stream(grey(200, 100), clip=False)
    np.testing.assert_allclose(official.boxes, [[-100, -50, 100, 150], [140, 25, 220, 75]], atol=1e-4)


@pytest.mark.parametrize("images", [[], (), np.zeros(0), np.zeros((0, 64, 96, 3), np.uint8)])
def test_no_images_give_no_detections(tmp_path, images):
    assert ld.Detector(save_detector(tmp_path / "model.onnx")).predict(images) == []


@pytest.mark.parametrize(
    "metadata, why",
    [
        ({"verification": {"verdict": "failed", "why": "boxes differ"}}, "failed its verification"),
        ({"verification": None}, "was not verified"),
        ({}, None),
    ],
)
def test_what_is_not_verified_runs_with_a_notice(tmp_path, metadata, why):
    path = save_detector(tmp_path / "model.onnx", **metadata)
    if why is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ld.Detector(path)
    else:
        with pytest.warns(Notice, match=rf"model\.onnx {why}.*not proven"):
            ld.Detector(path)


def test_what_was_rewritten_runs_with_a_notice(tmp_path):
    path = save_detector(tmp_path / "model.onnx")
    path.write_bytes(path.read_bytes().replace(b"tiny", b"TINY"))
    with pytest.warns(Notice, match="was rewritten after it was verified"):
        assert len(ld.Detector(path).predict(grey(20, 10))) == 1
