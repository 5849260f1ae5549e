"""The generated detection dataset: the same bytes everywhere, exact boxes, valid COCO annotations."""

import hashlib
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from litedetr_deploy.assets import shapes
from litedetr_deploy.assets.shapes import CLASS_NAMES, TRAIN_SEED, VALIDATION_SEED, coco_annotations, scene
from litedetr_deploy.errors import LiteDetrError

REPOSITORY = Path(__file__).parents[2]
# Of a scene's pixels, boxes and labels.  A trained model and its published AP belong to these scenes: change the sums
# only together with them, when the scenes are meant to change.
DIGESTS = {
    (0, VALIDATION_SEED, (256, 256)): "5cfcbfd13e327f6e",
    (399, VALIDATION_SEED, (256, 256)): "29b1a502aa01a6bb",
    (5, TRAIN_SEED, (256, 256)): "e20c23c78876b661",
    (6, TRAIN_SEED, (128, 128)): "5cd674f7e66f7a64",
    (7, TRAIN_SEED, (96, 161)): "423a82f50a257c39",
}


@pytest.fixture(scope="module")
def scenes():
    return [scene(index, VALIDATION_SEED) for index in range(30)]


@pytest.mark.parametrize("which", DIGESTS, ids=str)
def test_a_scene_has_the_same_bytes_everywhere(which):
    image, boxes, labels = scene(*which)
    content = image.tobytes() + boxes.astype("<f4").tobytes() + labels.astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == DIGESTS[which]


def test_scenes_differ_by_index_and_by_seed(scenes):
    pixels = {image.tobytes() for image, _, _ in scenes} | {scene(0, TRAIN_SEED)[0].tobytes()}
    assert len(pixels) == len(scenes) + 1


def test_boxes_and_labels(scenes):
    for image, boxes, labels in scenes:
        assert image.mode == "RGB" and image.size == (256, 256)
        assert boxes.dtype == np.float32 and labels.dtype == np.int64
        assert boxes.shape == (len(labels), 4) and 2 <= len(labels) <= 9
        assert (boxes >= 0).all() and (boxes <= 256).all()
        sides = boxes[:, 2:] - boxes[:, :2]
        assert (sides.max(1) >= shapes.SMALLEST * (1 - 2 * shapes.MOST_CUT)).all() and (sides.min(1) > 2).all()
    every = np.concatenate([labels for _, _, labels in scenes])
    assert sorted(set(every.tolist())) == list(range(len(CLASS_NAMES)))


@pytest.mark.parametrize("size", [(256, 256), (128, 128), (160, 97), (33, 300)], ids=str)
def test_the_size_is_height_and_width(size):
    for index in range(5):
        image, boxes, _ = scene(index, 3, size)
        assert image.size == size[::-1]
        assert (boxes <= (size[1], size[0]) * 2).all()


def test_a_size_without_room_is_refused():
    with pytest.raises(LiteDetrError, match="31x256.*at least 32"):
        scene(0, 0, (31, 256))


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)), ids=CLASS_NAMES)
def test_boxes_are_tight(label):
    """A shape drawn alone changes the pixels that its box touches, up to the slivers that its corners are."""
    rng = np.random.default_rng(label)
    for longest in (8, 13.3, 40, 120.7):
        shape = shapes._shape(rng, label, longest)
        shape.left, shape.top = (int(side) for side in rng.integers(5, 40, 2))
        mask = np.zeros((200, 200), np.float32)
        there, here = shapes._overlap(mask, shape.coverage, shape.left, shape.top)
        mask[there] = shape.coverage[here]
        x0, y0, x1, y1 = shape.box(mask.shape)
        assert max(x1 - x0, y1 - y0) == pytest.approx(longest)
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        for low, high, touched in ((x0, x1, columns), (y0, y1, rows)):
            assert math.floor(low) <= touched[0] <= low + 1
            assert high - 2 <= touched[-1] <= math.ceil(high) - 1


def test_coverage_is_the_area():
    triangle = np.array(((1.25, 1.5), (9.75, 2.25), (4.5, 8.0)))
    (ax, ay), (bx, by), (cx, cy) = triangle
    area = ((bx - ax) * (cy - ay) - (cx - ax) * (by - ay)) / 2
    coverage = shapes._coverage([triangle], 10, 12)
    assert coverage.min() == 0 and coverage.max() == 1
    assert coverage.sum() == pytest.approx(area, rel=0.01)
    hole = triangle[::-1] * 0.5 + triangle.mean(0) * 0.5
    assert shapes._coverage([triangle, hole], 10, 12).sum() == pytest.approx(area * 0.75, rel=0.02)


def test_no_shape_is_hidden():
    overlaps = 0
    for index in range(20):
        placed = shapes._place(np.random.default_rng(index), (256, 256))
        masks = np.zeros((len(placed), 256, 256), bool)
        for mask, shape in zip(masks, placed):
            there, here = shapes._overlap(mask, shape.coverage, shape.left, shape.top)
            mask[there] = shape.coverage[here] > 0.5
        for i, mask in enumerate(masks):
            covered = (mask & masks[i + 1 :].any(0)).sum() / mask.sum()
            assert covered <= shapes.MOST_COVERED
            overlaps += covered > 0
    assert overlaps  # else this has tested nothing


def test_boxes_cut_by_the_border_keep_most_of_themselves():
    cut = 0
    for index in range(20):
        for shape in shapes._place(np.random.default_rng(index), (256, 256)):
            x0, y0, x1, y1 = shape.box((256, 256))
            w0, h0, w1, h1 = shape.extent
            share = (x1 - x0) * (y1 - y0) / ((w1 - w0) * (h1 - h0))
            # A position is rounded to whole pixels: half a pixel more may be cut from either side.
            assert (x1 - x0 + 0.5) / (w1 - w0) >= 1 - shapes.MOST_CUT
            assert (y1 - y0 + 0.5) / (h1 - h0) >= 1 - shapes.MOST_CUT
            cut += share < 0.999
    assert cut


def test_coco_annotations(scenes):
    coco = json.loads(json.dumps(coco_annotations([found for _, *found in scenes])))
    assert [category["name"] for category in coco["categories"]] == list(CLASS_NAMES)
    assert [category["id"] for category in coco["categories"]] == list(range(len(CLASS_NAMES)))
    assert [image["id"] for image in coco["images"]] == list(range(len(scenes)))
    ids = [annotation["id"] for annotation in coco["annotations"]]
    assert len(set(ids)) == len(ids) and min(ids) == 1
    by_image = itertools.groupby(coco["annotations"], lambda annotation: annotation["image_id"])
    for (image_id, annotations), (index, (_, boxes, labels)) in zip(by_image, enumerate(scenes), strict=True):
        annotations = list(annotations)
        assert image_id == index
        assert [annotation["category_id"] for annotation in annotations] == labels.tolist()
        for annotation, box in zip(annotations, boxes, strict=True):
            x, y, w, h = annotation["bbox"]
            np.testing.assert_array_equal(np.float32((x, y, x + w, y + h)), box)
            assert annotation["area"] == w * h and annotation["iscrowd"] == 0


def run_make_dataset(*arguments):
    script = REPOSITORY / "examples" / "shapes" / "make_dataset.py"
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)


def test_make_dataset_writes_the_layout_of_coco(tmp_path):
    done = run_make_dataset(tmp_path / "data", "--count", 3, "--seed", 9, "--size", "64x96")
    assert done.returncode == 0, done.stderr
    coco = json.loads((tmp_path / "data" / "annotations" / "instances_val.json").read_text())
    assert coco == json.loads(json.dumps(coco_annotations([scene(i, 9, (64, 96))[1:] for i in range(3)], (64, 96))))
    for image in coco["images"]:
        with Image.open(tmp_path / "data" / "val" / image["file_name"]) as picture:
            assert (picture.height, picture.width) == (image["height"], image["width"]) == (64, 96)
            assert picture.tobytes() == scene(image["id"], 9, (64, 96))[0].tobytes()


@pytest.mark.parametrize("size", ["64", "16x16"])
def test_make_dataset_refuses_a_wrong_size(tmp_path, size):
    done = run_make_dataset(tmp_path / "data", "--size", size)
    assert done.returncode == 2 and size in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()
