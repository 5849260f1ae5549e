"""Sources -> detector -> sink: order, overlap, formats, and what an interruption leaves."""

import csv
import json
import os
import threading

import numpy as np
import pytest
from PIL import Image

import litedetr_deploy as ld
from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.runtime.predict import predict
from litedetr_deploy.runtime.sinks import open_sink
from litedetr_deploy.runtime.sources import find_sources

from .clips import STEP, grey, index_of, save_clip, save_gif
from .tiny_artifact import save_detector

pytest.importorskip("av")


@pytest.fixture
def detector(tmp_path):
    return ld.Detector(save_detector(tmp_path / "model.onnx", size=(48, 64)))


@pytest.fixture
def clip(tmp_path):
    return save_clip(tmp_path / "clip.mp4")


def run(detector, given, output=None, format=None, **options):
    sources = find_sources(given)
    return list(predict(detector, sources, open_sink(output, format, sources), 0.01, **options))


def number(record):
    """The number of a frame, from what the detector made of its pixels."""
    [score] = [one["score"] for one in record["detections"] if one["name"] == "person"]
    return round((score * 255 - 10) / STEP)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_frame_in_its_order(detector, clip, tmp_path, batch_size):
    (tmp_path / "bad.jpg").write_text("text")
    grey(5).save(tmp_path / "b.png")
    given = [clip, tmp_path / "bad.jpg", tmp_path / "b.png", save_gif(tmp_path / "c.gif")]
    records = run(detector, given, tmp_path / "out", batch_size=batch_size)
    assert [record.get("frame") for record in records] == [*range(10), None, None, 0, 1, 2]
    assert "is not an image" in records[10]["error"]
    assert [number(record) for record in records if "error" not in record] == [*range(10), 5, 0, 1, 2]
    assert records[3]["time"] == pytest.approx(0.3, abs=1e-3) and records[3]["size"] == [64, 48]
    assert records[0]["saved"] == str(tmp_path / "out" / "clip.mp4")
    assert sorted(os.listdir(tmp_path / "out")) == ["b.png", "c.gif", "clip.mp4"]
    [source] = find_sources(tmp_path / "out" / "clip.mp4")
    drawn = [frame.image for frame in source.read()]
    assert len(drawn) == 10 and all(np.asarray(image).std() > 5 for image in drawn)  # there are boxes on all


def test_the_api_takes_the_same_sources(detector, clip, tmp_path, monkeypatch):
    def numbers(images, **options):
        return [round((found.scores[1] * 255 - 10) / STEP) for found in detector.predict(images, **options)]

    assert numbers(clip) == numbers(str(clip), batch_size=4) == list(range(10))
    for index in range(3):
        grey(index).save(tmp_path / f"{index}.png")
    assert numbers(f"{tmp_path}/?.png") == numbers([tmp_path / "0.png", grey(1), str(tmp_path / "2.png")]) == [0, 1, 2]
    with pytest.raises(LiteDetrError, match="gone.mp4: the path does not exist"):
        numbers(tmp_path / "gone.mp4")
    [found] = detector.predict(grey(9), classes=["person", 2], max_detections=1)
    assert list(found.labels) == [1]


def test_decoding_inference_and_writing_overlap(detector, clip, tmp_path):
    """Each waits for the next step of the others: in turns they would wait for ever."""
    decoded, ran, written, late = [threading.Event() for _ in range(10)], threading.Event(), threading.Event(), []
    prepare, session_run = detector.prepare, detector.session.run

    def preparing(image, resize=None):
        decoded[index_of(image)].set()
        return prepare(image, resize)

    def running(feed):
        if round((feed["images"].mean() * 255 - 10) / STEP) == 0:
            late.append(decoded[2].wait(20))  # the third frame is decoded while the first is in the model
        if round((feed["images"].mean() * 255 - 10) / STEP) == 2:
            late.append(written.wait(20))  # the first is being written while the third is in the model
            ran.set()
        return session_run(feed)

    class Sink:
        def add(self, number, frame, found, record):
            if frame.index == 0:
                written.set()
                late.append(ran.wait(20))

        def close(self, done):
            pass

    detector.prepare, detector.session.run = preparing, running
    assert [record["frame"] for record in predict(detector, find_sources(clip), Sink(), 0)] == list(range(10))
    assert late == [True, True, True]


def test_an_error_of_the_sink_ends_it_and_leaves_nothing(detector, clip, tmp_path, monkeypatch):
    from litedetr_deploy.runtime.video import VideoWriter

    add = VideoWriter.add

    def failing(self, image, seconds):
        if seconds > 0.35:
            raise OSError(28, "No space left on device")
        add(self, image, seconds)

    monkeypatch.setattr(VideoWriter, "add", failing)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="No space left"):
        run(detector, clip, tmp_path / "out" / "a.mp4")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["a.mp4", "a.jsonl", "a.json", "a.csv"])
def test_an_interruption_leaves_complete_files(detector, clip, tmp_path, name):
    sources = find_sources(clip)
    records = predict(detector, sources, open_sink(tmp_path / name, None, sources), 0)
    seen = [next(records) for _ in range(3)]
    with pytest.raises(KeyboardInterrupt, match="frames were written"):
        records.throw(KeyboardInterrupt)
    assert sorted(os.listdir(tmp_path)) == sorted([name, "clip.mp4", "model.onnx"])
    if name == "a.mp4":
        [source] = find_sources(tmp_path / name)
        assert len(seen) <= len(list(source.read())) < 10
    elif name == "a.json":
        assert len(json.loads((tmp_path / name).read_text())) % 3 == 0
    else:
        assert len((tmp_path / name).read_text().splitlines()) >= 3


def test_json_lines(detector, clip, tmp_path):
    records = run(detector, clip, tmp_path / "a.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(10))
    assert lines[4]["detections"] == records[4]["detections"] and "saved" not in lines[4]


def test_csv(detector, clip, tmp_path):
    grey(1).save(tmp_path / "a, b.png")
    records = run(detector, [clip, tmp_path / "a, b.png"], tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    objects = [(record, one) for record in records for one in record["detections"]]
    assert len(rows) == len(objects)
    for row, (record, one) in zip(rows, objects):
        assert row["path"] == record["path"] and row["name"] == one["name"] and int(row["label"]) == one["label"]
        assert row["frame"] == str(record.get("frame", ""))
        assert [float(row[key]) for key in ("x1", "y1", "x2", "y2")] == one["box"]


def test_coco_results_are_read_by_pycocotools(detector, tmp_path):
    from pycocotools.coco import COCO

    for index in (7, 12):
        grey(1, (200, 100)).save(tmp_path / f"{index:012}.jpg")
    run(detector, f"{tmp_path}/*.jpg", tmp_path / "results.json")
    images = [{"id": index, "width": 200, "height": 100} for index in (7, 12)]
    truth = COCO()
    truth.dataset = {"images": images, "categories": [{"id": i} for i in (1, 18)], "annotations": []}
    truth.createIndex()
    results = truth.loadRes(str(tmp_path / "results.json"))
    assert sorted(results.getImgIds()) == [7, 12]
    boxes = {one["category_id"]: one["bbox"] for one in results.loadAnns(results.getAnnIds(imgIds=[12]))}
    assert boxes == {18: pytest.approx([50, 25, 100, 25]), 1: pytest.approx([0, 0, 200, 100])}
    grey(1).save(tmp_path / "photo.jpg")  # not numbered: all have their paths
    run(detector, f"{tmp_path}/*.jpg", tmp_path / "other.json")
    named = {one["image_id"] for one in json.loads((tmp_path / "other.json").read_text())}
    assert named == {str(path) for path in tmp_path.glob("*.jpg")}


def test_yolo_text(detector, clip, tmp_path):
    grey(1, (200, 100)).save(tmp_path / "a.png")
    run(detector, [tmp_path / "a.png", clip], tmp_path / "labels", "yolo")
    rows = [line.split() for line in (tmp_path / "labels" / "a.txt").read_text().splitlines()]
    assert [row[0] for row in rows] == ["18", "1"]
    assert [float(value) for value in rows[0][1:]] == pytest.approx([0.5, 0.375, 0.5, 0.25, 0.9], abs=1e-6)
    assert sorted(os.listdir(tmp_path / "labels" / "clip")) == [f"{index:06}.txt" for index in range(10)]


def test_pictures_of_a_video(detector, clip, tmp_path):
    records = run(detector, clip, tmp_path / "out", "pictures")
    assert records[2]["saved"] == str(tmp_path / "out" / "clip" / "000002.jpg")
    assert Image.open(records[9]["saved"]).size == (64, 48) and len(os.listdir(tmp_path / "out" / "clip")) == 10


def test_names_do_not_clash(detector, tmp_path):
    for name in ("a.mov", "a.mkv", "in/a.mov"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_clip(tmp_path / name, 2)
    run(detector, [tmp_path / name for name in ("a.mov", "a.mkv", "in/a.mov")], tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["a-2.mp4", "a-3.mp4", "a.mp4"]


@pytest.mark.parametrize(
    "given, output, format, message",
    [
        ("clip.mp4", "a.png", None, "is an image, and .*clip.mp4 is a video"),
        ("a.jpg", "a.mp4", None, "is a video, and .*a.jpg is an image"),
        ("clip.mp4", "a.avi", None, "'.avi', which is no image format, no video format"),
        ("clip.mp4", "a.mp4", "pictures", "is one file, and .*clip.mp4 is a video"),
        ("clip.mp4", "clip.mp4", None, "is one of the images itself"),
        ("clip.mp4", ".", None, "is one of the images itself"),
        ("clip.mp4", "gone/a.jsonl", None, "gone does not exist"),
        ("clip.mp4", ".", "csv", "is a directory, and csv is one file"),
        ("clip.mp4", None, "yolo", "files in a directory"),
        ("clip.mp4", "a", "jsno", "must be one of pictures, jsonl, coco, csv, yolo. Did you mean 'jsonl'"),
    ],
)
def test_outputs_that_do_not_fit(clip, tmp_path, given, output, format, message):
    grey(0).save(tmp_path / "a.jpg")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LiteDetrError, match=message):
        open_sink(None if output is None else tmp_path / output, format, find_sources(tmp_path / given))
    assert sorted(tmp_path.rglob("*")) == before


def test_detections_of_supervision(detector):
    sv = pytest.importorskip("supervision")
    [found] = detector.predict(grey(9, (200, 100)), threshold=0.5)
    taken = found.to_supervision()
    assert isinstance(taken, sv.Detections) and list(taken["class_name"]) == found.names == ["dog", "person"]
    np.testing.assert_array_equal(taken.xyxy, found.boxes)
    np.testing.assert_array_equal(taken.class_id, found.labels)
    np.testing.assert_array_equal(taken.confidence, found.scores)
    assert len(taken[taken.class_id == 18]) == 1
    [none] = detector.predict(grey(0), threshold=0.95)
    assert len(none.to_supervision()) == 0
