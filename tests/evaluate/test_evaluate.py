import copy
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

import litedetr_deploy as ld
from litedetr_deploy.errors import LiteDetrError, Notice
from litedetr_deploy.evaluate import data
from litedetr_deploy.evaluate.average_precision import average_precision
from litedetr_deploy.evaluate.evaluate import compare, evaluate
from litedetr_deploy.evaluate.match import compare_detections
from litedetr_deploy.runtime.detector import Detections
from litedetr_deploy.runtime.session import OnnxSession

from ..runtime.tiny_artifact import BOXES, NAMES, save_detector, save_raw_detector

pytest.importorskip("pycocotools")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of interrupted evaluations."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "litedetr-deploy"


class FakeSession:
    """Finds on each grey image what a dict of its value -> (labels, boxes xyxy in pixels, scores) says."""

    inputs = {"images": ("batch", 3, 100, 100), "orig_target_sizes": ("batch", 2)}
    outputs = ("labels", "boxes", "scores")

    def __init__(self, found, **metadata):
        self.found, self.metadata = found, metadata

    def run(self, feed):
        values = np.rint(feed["images"].mean((1, 2, 3)) * 255).astype(int)
        found = [self.found[value] for value in values.tolist()]
        return {
            "labels": np.array([one[0] for one in found], np.int64).reshape(len(values), -1),
            "boxes": np.array([one[1] for one in found], np.float32).reshape(len(values), -1, 4),
            "scores": np.array([one[2] for one in found], np.float32).reshape(len(values), -1),
        }


def write_coco(folder, boxes, categories=((1, "person"), (18, "dog")), size=(100, 100)):
    """Write grey images 0, 1, ... with the boxes [(category, [x, y, w, h]), ...] of each, in COCO's layout."""
    (folder / "val").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for number in range(len(boxes)):
        Image.new("RGB", size, (number,) * 3).save(folder / "val" / f"{number}.png")
    contents = {
        "categories": [{"id": id, "name": name} for id, name in categories],
        "images": [
            {"id": 100 + number, "file_name": f"{number}.png", "width": size[0], "height": size[1]}
            for number in range(len(boxes))
        ],
        "annotations": [
            {"image_id": 100 + number, "category_id": category, "bbox": box}
            for number, ofimage in enumerate(boxes)
            for category, box in ofimage
        ],
    }
    for number, annotation in enumerate(contents["annotations"]):
        annotation["id"] = number  # from 0, as the data of many does
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(contents))
    return folder


def change(folder, changed):
    """Rewrite the annotations of `write_coco` after `changed` has been called with them."""
    file = folder / "annotations" / "instances_val.json"
    contents = json.loads(file.read_text())
    file.write_text(json.dumps(changed(contents) or contents))


def test_ap_by_hand(tmp_path):
    # Three objects; in order of score: a hit of IoU 0.82 (50x41 inside 50x50), a miss, a perfect hit.
    # Thresholds 0.5 to 0.8, seven: precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3.  Of the recalls 0, 0.01, ... 1 the
    # first 34 lie up to 1/3 and have precision 1, the next 33 lie up to 2/3 and have 2/3, the rest has none:
    # AP = (34 + 22) / 101.  Thresholds 0.85 to 0.95, three: precision 0, 0, 1/3 at recall 0, 0, 1/3:
    # AP = 34 / 3 / 101.
    dataset = data.read_coco(
        write_coco(tmp_path / "data", [[(1, [10, 10, 50, 50])], [(1, [0, 0, 50, 50]), (1, [50, 50, 50, 50])]])
    )
    boxes = [(10, 10, 60, 51), (0, 50, 50, 100), (0, 0, 50, 50)]
    session = FakeSession({0: ([1, 1], [boxes[0], (0, 0, 0, 0)], [0.9, 0]), 1: ([1, 1], boxes[1:], [0.8, 0.7])})
    found = evaluate(session, dataset).metrics
    hit = 56 / 101
    assert found["AP50"] == pytest.approx(hit) and found["AP75"] == pytest.approx(hit)
    assert found["AP"] == pytest.approx((7 * hit + 3 * 34 / 303) / 10)
    assert found["AP_medium"] == pytest.approx(found["AP"])  # 2500 square pixels: between 32 and 96 squared
    assert found["AP_small"] is None and found["AP_large"] is None
    assert found["AR100"] == pytest.approx((7 * 2 / 3 + 3 * 1 / 3) / 10)


def perfect(dataset, labels=None, shift=0.0):
    """Return a session that finds on the drawn or the written images what their annotations say."""
    found = {}
    for number, image in enumerate(dataset.images):
        annotations = [one for one in dataset.annotations if one["image_id"] == image["id"]]
        boxes = [(x + shift, y, x + w + shift, y + h) for x, y, w, h in (one["bbox"] for one in annotations)]
        ids = [one["category_id"] for one in annotations]
        found[number] = [labels[id] for id in ids] if labels else ids, boxes, [0.9] * len(boxes)
    return FakeSession(found)


OBJECTS = [[(1, [10, 10, 20, 20]), (18, [50, 50, 50.9, 30])], [(1, [0, 0, 99, 99]), (18, [5, 5, 40, 60])]]


def test_perfect_detections(tmp_path):
    dataset = data.read_coco(write_coco(tmp_path / "data", OBJECTS))
    result = evaluate(perfect(dataset), dataset, batch_size=2)
    assert [result.metrics[name] for name in ("AP", "AP50", "AP_small", "AP_large")] == pytest.approx([1] * 4)
    assert (result.images, result.objects, result.image_size, result.resize) == (2, 4, [100, 100], "stretch")
    assert result.latency_ms["p90"] >= result.latency_ms["median"] > 0
    assert result.images_per_second > 0 and "detections" not in result.to_dict()
    json.dumps(result.to_dict())


def test_no_detection_at_all(tmp_path):
    dataset = data.read_coco(write_coco(tmp_path / "data", OBJECTS))
    nothing = Detections(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    assert average_precision(dataset, {100: nothing, 101: nothing})["AP"] == 0


def test_categories_that_the_data_numbers_otherwise(tmp_path):
    dataset = data.read_coco(
        write_coco(
            tmp_path / "data",
            [[(0, [10, 10, 20, 20]), (1, [40, 40, 20, 20])]],
            categories=((0, "dog"), (1, "person"), (7, "never used")),
        )
    )
    session = perfect(dataset, labels={0: 2, 1: 1})
    session.metadata = {"class_names": ["N/A", "person", "dog"]}
    result = evaluate(session, dataset)
    assert result.metrics["AP"] == pytest.approx(1)
    assert sorted(result.detections[100].labels) == [0, 1]
    session.metadata = {"class_names": ["N/A", "person", "cat"]}
    with pytest.raises(LiteDetrError, match=r"does not know the category 0, 'dog'.*N/A, person, cat"):
        evaluate(session, dataset)
    session.metadata = {"num_classes": 1}
    with pytest.raises(LiteDetrError, match=r"does not know the category 1, 'person'.*labels are 0 to 0"):
        evaluate(session, dataset)


def test_shapes_are_found_where_they_were_drawn():
    dataset = data.drawn_shapes(3)
    assert len(dataset.images) == 3 and dataset.image_size == (256, 256)

    class Perfect(FakeSession):
        inputs = {"images": ("batch", 3, "height", "width"), "orig_target_sizes": ("batch", 2)}

        def run(self, feed):
            assert feed["images"].shape == (1, 3, 256, 256)
            index = next(
                i
                for i, image in enumerate(dataset.images)
                if np.allclose(feed["images"][0].transpose(1, 2, 0) * 255, np.asarray(dataset.load(image)))
            )
            return super().run({"images": np.full((1, 3, 4, 4), index / 255)})

    assert evaluate(Perfect(perfect(dataset).found), dataset).metrics["AP"] == pytest.approx(1)


def test_comparison_of_a_known_shift(tmp_path):
    dataset = data.read_coco(write_coco(tmp_path / "data", OBJECTS))
    first, second = perfect(dataset), perfect(dataset, shift=2.0)
    second.found = copy.deepcopy(second.found)
    second.found[0][2][1] = 0.8
    second.found[1][2][1] = 0.04  # below the floor
    result = compare(first, second, dataset)
    assert result.ap_difference == pytest.approx(result.second.metrics["AP"] - 1) and result.ap_difference < 0
    found = result.detections
    assert found["matched"] == 3 and found["unmatched"] == [1, 0]
    assert found["box_difference_px"] == pytest.approx({"largest": 2.0, "mean": 2.0}, abs=1e-5)
    assert found["score_difference"] == pytest.approx({"largest": 0.1, "mean": 0.1 / 3}, rel=1e-5)
    same = compare(first, first, dataset)
    assert same.ap_difference == 0 and same.detections["matched"] == 4
    assert same.detections["unmatched"] == [0, 0] and same.detections["box_difference_px"]["largest"] == 0
    json.dumps(result.to_dict())


def test_matching_is_one_to_one_by_label_and_overlap():
    def detections(*rows):
        labels, boxes, scores = zip(*rows)
        return {0: Detections(np.array(labels), np.array(boxes, np.float32), np.array(scores, np.float32))}

    box, near, far = (0, 0, 10, 10), (1, 0, 11, 10), (6, 0, 16, 10)
    found = compare_detections(
        detections((1, box, 0.9), (1, box, 0.8), (2, box, 0.5)),
        detections((1, near, 0.3), (1, box, 0.7), (3, box, 0.5), (2, far, 0.5)),
    )
    # The best takes its equal, the second what is left; label 2 overlaps by 4 / 16 only.
    assert found["matched"] == 2 and found["unmatched"] == [1, 2]
    assert found["box_difference_px"] == {"largest": 1.0, "mean": 0.5}
    assert found["score_difference"]["largest"] == pytest.approx(0.5)
    empty = {0: Detections(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32))}
    none = compare_detections(empty, detections((1, box, 0.9)))
    assert none["matched"] == 0 and none["unmatched"] == [0, 1] and none["box_difference_px"]["largest"] is None


def test_input_size_of_a_pair(tmp_path):
    dataset = data.read_coco(write_coco(tmp_path / "data", OBJECTS))
    fixed = save_detector(tmp_path / "fixed.onnx", size=(64, 96))
    dynamic = save_detector(tmp_path / "dynamic.onnx", size=None, pixel_mask=True)
    result = compare(dynamic, fixed, dataset)
    assert result.first.image_size == result.second.image_size == [64, 96]
    assert result.first.resize == result.second.resize == "stretch"
    other = save_detector(tmp_path / "other.onnx", size=(80, 70))
    result = compare(fixed, other, dataset)
    assert (result.first.image_size, result.second.image_size) == ([64, 96], [80, 70])
    assert evaluate(dynamic, dataset, image_size=(80, 70)).image_size == [80, 70]
    alone = evaluate(dynamic, dataset)
    assert alone.image_size is None and alone.resize == "shortest_edge"
    with pytest.raises(LiteDetrError, match=r"fixed at 64x96.*80x70 was asked for"):
        evaluate(fixed, dataset, image_size=(80, 70))


class Interruption:
    """Interrupts at the run of a number; counts the runs."""

    def __init__(self, monkeypatch, at=None):
        self.runs = 0
        run = OnnxSession.run

        def counted(session, feed):
            if self.runs == at:
                raise KeyboardInterrupt
            self.runs += 1
            return run(session, feed)

        monkeypatch.setattr(OnnxSession, "run", counted)


def interrupted(model, folder, at):
    with pytest.MonkeyPatch.context() as patch:
        Interruption(patch, at)
        with pytest.raises(KeyboardInterrupt, match=rf"{at} of 4 images are done and kept in .*evaluate-\w+\.jsonl"):
            evaluate(model, data.read_coco(folder))


@pytest.fixture
def four(tmp_path):
    boxes = [[(1, [0, 0, 50 + 10 * number, 90])] for number in range(4)]
    return save_detector(tmp_path / "model.onnx"), write_coco(tmp_path / "four", boxes)


def test_an_interrupted_evaluation_continues(four, cache, monkeypatch):
    model, folder = four
    whole = evaluate(model, data.read_coco(folder))
    assert whole.continued == 0 and not any(cache.iterdir())

    interrupted(model, folder, at=3)
    [file] = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-10])  # killed while it wrote the third
    counted, stages = Interruption(monkeypatch), []
    result = evaluate(model, data.read_coco(folder), progress=lambda *now: stages.append(now))
    assert counted.runs == 2 and result.continued == 2
    assert result.metrics == whole.metrics
    for image in whole.detections:
        np.testing.assert_array_equal(result.detections[image].boxes, whole.detections[image].boxes)
        np.testing.assert_array_equal(result.detections[image].scores, whole.detections[image].scores)
    assert (f"evaluate {model}, continued: 2 of 4 images were done before", 2, 4) in stages
    assert not any(cache.iterdir())


@pytest.mark.parametrize("what", ["artifact", "annotations", "image", "setting"])
def test_a_change_begins_anew(four, what, monkeypatch):
    model, folder = four
    interrupted(model, folder, at=2)
    options = {}
    if what == "artifact":
        save_detector(model, precision="fp16")
    elif what == "annotations":
        change(folder, lambda contents: contents["annotations"][0].update(bbox=[0, 0, 10, 10]))
    elif what == "image":
        os.utime(folder / "val" / "0.png", ns=(0, 0))
    else:
        options = {"batch_size": 2}
    counted = Interruption(monkeypatch)
    assert evaluate(model, data.read_coco(folder), **options).continued == 0
    assert counted.runs == (2 if options else 4)


def test_an_interruption_of_the_second_leaves_the_first_done(four, tmp_path, monkeypatch):
    model, folder = four
    other = save_detector(tmp_path / "other.onnx", precision="fp16")
    with pytest.MonkeyPatch.context() as patch:
        Interruption(patch, at=5)
        with pytest.raises(KeyboardInterrupt, match="1 of 4 images"):
            compare(model, other, data.read_coco(folder))
    counted = Interruption(monkeypatch)
    result = compare(model, other, data.read_coco(folder))
    assert (result.first.continued, result.second.continued, counted.runs) == (4, 1, 3)


def test_unwritable_cache(four, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(LiteDetrError, match="set XDG_CACHE_HOME"):
        evaluate(four[0], data.read_coco(four[1]))


@pytest.mark.parametrize("place", [1, 2])
def test_nan(tmp_path, place):
    dataset = data.read_coco(write_coco(tmp_path / "data", OBJECTS))
    session = perfect(dataset)
    session.found[1][place][0] = np.full_like(session.found[1][place][0], np.nan)
    with pytest.raises(LiteDetrError, match=r"NaN or an infinity for the image 1\.png"):
        evaluate(session, dataset)


def remove(part, field=None):
    def changed(contents):
        if field:
            del contents[part][0][field]
        else:
            del contents[part]

    return changed


@pytest.mark.parametrize(
    "changed, message",
    [
        (lambda contents: [1, 2], "is not a COCO annotation file: it holds a list"),
        (remove("images"), "has no list 'images'"),
        (remove("images", "height"), "entry 0 of 'images' lacks height"),
        (remove("annotations", "bbox"), "entry 0 of 'annotations' lacks bbox"),
        (lambda contents: contents.update(images=[], annotations=[]), "lists no images"),
        (lambda contents: contents.update(annotations=[]), "no annotated object on the 2 images"),
        (lambda contents: [one.update(iscrowd=1) for one in contents["annotations"]] and None, "no annotated object"),
        (lambda contents: contents["annotations"][0].update(image_id=7), "annotation 0 has the image_id 7"),
        (lambda contents: contents["annotations"][0].update(category_id=7), "annotation 0 has the category_id 7"),
        (lambda contents: contents["categories"][0].update(id="1"), "id '1'; a category's id must be a whole number"),
        (lambda contents: contents["images"][1].update(id=100), "2 images with only 1 different ids"),
        (
            lambda contents: contents["images"][1].update(file_name="gone.png"),
            r"1 of the 2 images .* first of them gone.png",
        ),
        (
            lambda contents: contents["annotations"][1].update(bbox=[50, 50, 51.1, 30]),
            r"annotation 1 has the box \[50, 50, 51.1, 30\].*not inside its image 0.png of 100x100",
        ),
        (lambda contents: contents["annotations"][1].update(bbox=[-1.1, 50, 20, 30]), "annotation 1 has the box"),
        (lambda contents: contents["annotations"][1].update(bbox=[10, 10, -5, 5]), "annotation 1 has the box"),
        (lambda contents: contents["annotations"][1].update(bbox=[10, 10, 5]), "annotation 1 has the box"),
        (
            lambda contents: contents["annotations"][1].update(bbox=[10, 10, float("nan"), 5]),
            "annotation 1 has the box",
        ),
    ],
)
def test_annotations_that_are_wrong(tmp_path, changed, message):
    folder = write_coco(tmp_path / "data", OBJECTS)
    change(folder, changed)
    with pytest.raises(LiteDetrError, match=message):
        data.read_coco(folder)


def test_an_image_of_another_size(tmp_path):
    folder = write_coco(tmp_path / "data", OBJECTS)
    Image.new("RGB", (50, 40)).save(folder / "val" / "1.png")
    dataset = data.read_coco(folder)
    with pytest.raises(LiteDetrError, match=r"1\.png is 50x40 pixels.*for 100x100"):
        evaluate(perfect(dataset), dataset)


def test_count_takes_the_first_images(tmp_path):
    folder = write_coco(tmp_path / "data", [[], *OBJECTS])
    dataset = data.read_coco(folder, count=2)
    assert [image["file_name"] for image in dataset.images] == ["0.png", "1.png"] and len(dataset.annotations) == 2
    with pytest.raises(LiteDetrError, match="or a larger count"):
        data.read_coco(folder, count=1)
    with pytest.raises(LiteDetrError, match="count is 0"):
        data.read_coco(folder, count=0)


def test_the_folder_of_images(tmp_path):
    folder = write_coco(tmp_path / "data", OBJECTS)
    file = folder / "annotations" / "instances_val.json"
    assert len(data.read_coco(file, folder / "val").images) == 2
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((file,), "--images"),
        ((file, tmp_path / "empty"), "is empty"),
        ((file, tmp_path / "gone"), "does not exist"),
        ((file, file), "is not a folder"),
        ((tmp_path / "gone",), "does not exist"),
        ((tmp_path / "empty",), "no annotations"),
        ((folder / "val" / "0.png", folder / "val"), "is not JSON"),
    ):
        with pytest.raises(LiteDetrError, match=message):
            data.read_coco(*arguments)


def test_evaluator_not_installed(four, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(LiteDetrError, match=r"litedetr-deploy\[evaluate\]"):
        evaluate(four[0], data.read_coco(four[1]))


def test_torch_session_detects_what_the_onnx_model_does(tmp_path):
    torch = pytest.importorskip("torch")
    from litedetr_deploy.model.config import DetectorConfig
    from litedetr_deploy.model.deployed import TorchSession

    random = np.random.default_rng(0)
    logits = random.normal(size=(6, len(NAMES))).astype(np.float32)
    boxes = random.uniform(0.2, 0.6, (6, 4)).astype(np.float32)

    class Constant(torch.nn.Module):
        config = DetectorConfig(num_classes=len(NAMES))
        class_names = tuple(NAMES)

        def forward(self, images, pixel_mask=None):
            assert pixel_mask is None
            batch = len(images)
            return {
                "pred_logits": torch.from_numpy(logits).repeat(batch, 1, 1),
                "pred_boxes": torch.from_numpy(boxes).repeat(batch, 1, 1),
                "proposal_scores": torch.zeros(batch, 6),
                "topk_indices": torch.zeros(batch, 6, dtype=torch.int64),
            }

    dataset = data.read_coco(write_coco(tmp_path / "data", OBJECTS))
    model = save_raw_detector(tmp_path / "raw.onnx", logits, boxes)
    result = compare(TorchSession(Constant()), model, dataset, batch_size=2)
    assert result.first.image_size == result.second.image_size == [64, 96]
    # Box coordinates up to 100 pixels and scores up to 1, both a few float32 roundings apart.
    eps = np.finfo(np.float32).eps
    for image, found in result.first.detections.items():
        assert len(found) == 6 * 2 == len(result.second.detections[image])  # the data has two of the categories
        np.testing.assert_array_equal(found.labels, result.second.detections[image].labels)
        np.testing.assert_allclose(found.boxes, result.second.detections[image].boxes, atol=400 * eps)
        np.testing.assert_allclose(found.scores, result.second.detections[image].scores, atol=4 * eps)


def test_torch_session_takes_a_mask():
    torch = pytest.importorskip("torch")
    from litedetr_deploy.model.config import DetectorConfig
    from litedetr_deploy.model.deployed import TorchSession

    class Padding(torch.nn.Module):
        config = DetectorConfig(num_classes=1)
        class_names = None

        def forward(self, images, pixel_mask=None):
            # The score tells the share of padding, and that padding is 0 after normalisation.
            assert images[pixel_mask[:, None].expand_as(images)].abs().max() == 0
            share = pixel_mask.float().mean((1, 2))[:, None, None]
            return {
                "pred_logits": share,
                "pred_boxes": torch.full((len(images), 1, 4), 0.5),
                "proposal_scores": share[..., 0],
                "topk_indices": torch.zeros(len(images), 1, dtype=torch.int64),
            }

    mask = np.zeros((1, 8, 8), bool)
    mask[:, :, 6:] = True
    output = TorchSession(Padding()).run(
        {"images": np.ones((1, 3, 8, 8), np.float32), "pixel_mask": mask, "orig_target_sizes": np.array([[40, 20]])}
    )
    assert output["scores"].item() == pytest.approx(1 / (1 + np.exp(-0.25)))
    np.testing.assert_allclose(output["boxes"], [[[10, 5, 30, 15]]])


def test_what_neither_onnx_nor_a_checkpoint_is(four, tmp_path):
    pytest.importorskip("torch")
    dataset = data.read_coco(four[1])
    with pytest.raises(LiteDetrError, match="gone.pth does not exist"):
        evaluate(tmp_path / "gone.pth", dataset)


def test_boxes_of_the_tiny_artifact(four):
    result = evaluate(four[0], data.read_coco(four[1]))
    found = result.detections[100]
    assert sorted(found.labels.tolist()) == [1, 18]  # the data has no category 95
    np.testing.assert_allclose(found.boxes, BOXES[:2] * 100)


def test_the_detector_in_the_box_finds_most_shapes():
    """Its model card says AP 0.810 and AP50 0.929 on all 400 scenes."""
    report = evaluate("lite-dino-shapes", data.drawn_shapes(40))
    assert report.metrics["AP"] > 0.7 and report.metrics["AP50"] > 0.85


def test_the_package_is_callable(four):
    model, folder = four
    assert ld.evaluate(model, folder).to_dict()["metrics"] == evaluate(model, data.read_coco(folder)).metrics
    with pytest.raises(LiteDetrError, match="batch_size is 0"):
        ld.evaluate(model, folder, batch_size=0)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b.png", "..", 7])
def test_file_names_that_leave_the_folder_of_images(tmp_path, name):
    folder = write_coco(tmp_path / "data", OBJECTS)
    change(folder, lambda contents: contents["images"][0].update(file_name=name))
    with pytest.raises(LiteDetrError, match="the file name .* which is not inside the folder of images"):
        data.read_coco(folder)


def test_file_names_in_folders_below(tmp_path):
    folder = write_coco(tmp_path / "data", OBJECTS)
    (folder / "val" / "below").mkdir()
    (folder / "val" / "0.png").rename(folder / "val" / "below" / "0.png")
    change(folder, lambda contents: contents["images"][0].update(file_name="below/../below/0.png"))
    assert len(data.read_coco(folder).images) == 2


def test_boxes_stay_as_the_official_evaluation_takes_them(tmp_path):
    logits, boxes = np.full((1, 19), -9, np.float32), np.array([[0.0, 0.5, 1.0, 0.5]], np.float32)
    logits[0, 1] = 3
    model = save_raw_detector(tmp_path / "model.onnx", logits, boxes)
    result = evaluate(model, write_coco(tmp_path / "data", OBJECTS))
    assert result.detections[100].boxes[0, 0] == -50


def test_a_file_that_is_not_verified_is_evaluated_with_a_notice(tmp_path):
    model = save_detector(tmp_path / "model.onnx", verification=None)
    with pytest.warns(Notice, match="model.onnx was not verified"):
        evaluate(model, write_coco(tmp_path / "data", OBJECTS))


def test_threads_of_pytorch_are_bounded():
    torch = pytest.importorskip("torch")
    from litedetr_deploy.machine import usable_cores

    before = torch.get_num_threads()
    try:
        with pytest.warns(Notice, match="100000 threads are asked for"):
            evaluate("lite-dino-shapes", data.drawn_shapes(1), threads=100_000)
        assert torch.get_num_threads() == usable_cores()
    finally:
        torch.set_num_threads(before)
