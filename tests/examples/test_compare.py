"""The comparison of Lite with full scale, examples/shapes/compare.py: its bootstrap, and what it writes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import litedetr_deploy as ld
from litedetr_deploy.assets.shapes import CLASS_NAMES
from litedetr_deploy.evaluate.average_precision import average_precision, matched
from litedetr_deploy.evaluate.data import drawn_shapes
from litedetr_deploy.evaluate.evaluate import evaluate

pytest.importorskip("pycocotools")
FOLDER = Path(__file__).parents[2] / "examples" / "shapes"
SCENES = 12


@pytest.fixture
def script():
    import compare

    return compare


@pytest.fixture(scope="module")
def found():
    dataset = drawn_shapes(SCENES)
    return dataset, evaluate("lite-dino-shapes", dataset, threads=1).detections


def test_resampled_ap_is_that_of_pycocotools(script, found):
    dataset, detections = found
    times = np.random.default_rng(0).integers(0, 4, SCENES)
    assert 0 in times and times.max() == 3
    repeated = [(entry, copy) for entry, n in zip(dataset.images, times) for copy in range(n)]
    ids = {(entry["id"], copy): number for number, (entry, copy) in enumerate(repeated)}
    data = dataclasses.replace(
        dataset,
        images=[entry | {"id": ids[entry["id"], copy]} for entry, copy in repeated],
        annotations=[
            one | {"image_id": ids[entry["id"], copy]}
            for entry, copy in repeated
            for one in dataset.annotations
            if one["image_id"] == entry["id"]
        ],
    )
    expected = average_precision(data, {number: detections[image] for (image, _), number in ids.items()})
    model = script.Resampled(matched(dataset, detections))
    assert model(times) == pytest.approx([expected[area] for area in script.AREAS], abs=1e-12)
    once = average_precision(dataset, detections)
    assert model(np.ones(SCENES)) == pytest.approx([once[area] for area in script.AREAS], abs=1e-12)


def test_all_models_are_resampled_alike(script, found):
    dataset, detections = found
    worse = {image: dataclasses.replace(one, boxes=one.boxes + 2) for image, one in detections.items()}
    models = [script.Resampled(matched(dataset, one)) for one in (detections, detections, worse)]
    measured, drawn = script.resample(models, SCENES, 30)
    assert np.array_equal(drawn[:, 0], drawn[:, 1], equal_nan=True)
    assert drawn[:, 0, 0].std() > 0 and (drawn[:, 2, 0] < drawn[:, 0, 0]).all()
    low, high = script.interval(drawn[:, 0, 0])
    assert low < measured[0, 0] < high


def test_comparison_is_written(script, tmp_path, capsys):
    models = ["full=lite-dino-shapes", "lite=lite-dino-shapes"]
    latency = Path(__file__).parents[2] / "benchmarks" / "results" / "latency-shapes.json"
    script.compare(models, tmp_path / "out", latency, SCENES, 20, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "out.md", "out.png"}
    first, second = json.loads((tmp_path / "out.json").read_text())["models"]
    assert second["AP"]["ratio_interval"] == [1, 1]
    assert first["AP"]["value"] == pytest.approx(first["metrics"]["AP"], abs=1e-12)
    times = json.loads(latency.read_text())["results"]
    times = [x for x in times if (x["variant"], x["backend"], x["threads"]) == (first["variant"], "onnxruntime-op", 1)]
    assert [first["latency_ms"]] == [x["median_ms"] for x in times]
    assert (tmp_path / "out.md").read_text() in capsys.readouterr().out


def test_the_twin_that_is_kept_is_a_trained_full_scale_detector(found):
    dataset, _ = found
    twin = ld.load_model(FOLDER / "dino-shapes.safetensors")
    assert twin.config.name == "dino-r26n" and not twin.config.is_lite and twin.class_names == CLASS_NAMES
    assert evaluate(FOLDER / "dino-shapes.safetensors", dataset, threads=1).metrics["AP"] > 0.65  # of 12 scenes
