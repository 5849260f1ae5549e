"""What DeepStream's nvinfer is given: the parser, called as nvinfer calls it under AddressSanitizer, and the folder.

DeepStream itself was never run.
"""

import configparser
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import litedetr_deploy as ld
from litedetr_deploy.assets.shapes import CLASS_NAMES, scene
from litedetr_deploy.serve.deepstream import write_folder

ROOT = Path(__file__).parents[2]
SIZE = (256, 256)
THRESHOLD, CLASSES = 0.3, len(CLASS_NAMES)
TYPES = {np.dtype(np.float32): 0, np.dtype(np.int32): 3, np.dtype(np.int64): 4}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler is installed")
    path = tmp_path_factory.mktemp("deepstream") / "parse"
    tests = ROOT / "plugins" / "tests" / "deepstream"
    command = ["c++", "-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    command += ["-fno-sanitize-recover=all", f"-I{tests}", "-o", path, tests / "parse.cpp"]
    result = subprocess.run([*command, ROOT / "plugins/deepstream/parser.cpp"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return path


def parse(program, tensors: dict, threshold=THRESHOLD, classes=CLASSES):
    """Return the objects [label, score, x1, y1, x2, y2] that the parser finds, or what it says."""
    data = b""
    for name, array in tensors.items():
        words = [name, TYPES[array.dtype], array.ndim, *array.shape]
        data += " ".join(map(str, words)).encode() + b"\n" + np.ascontiguousarray(array).tobytes()
    command = [program, *map(str, (SIZE[1], SIZE[0], classes, threshold))]
    result = subprocess.run(command, input=data, capture_output=True)
    if result.returncode:
        assert result.returncode == 1, result.stderr.decode()
        return result.stderr.decode()
    assert not result.stderr, result.stderr.decode()
    return np.array([line.split() for line in result.stdout.decode().splitlines()], np.float64).reshape(-1, 6)


@pytest.fixture(scope="module", params=["detections", "raw"])
def recorded(request, tmp_path_factory):
    """What the shipped detector gives for one image, and what is on it."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    ld.export_onnx(
        ld.load_model("lite-dino-shapes"),
        path,
        image_size=SIZE,
        outputs=request.param,
        attention="gather",
        verify=False,
    )
    image = scene(3, 5, SIZE)[0]
    detector = ld.Detector(path, threads=1)
    feed = {"images": (np.asarray(image, np.float32) / 255).transpose(2, 0, 1)[None]}
    if request.param == "detections":
        feed["orig_target_sizes"] = np.array([SIZE[::-1]], np.int64)
    outputs = detector.session.run(feed)
    return {name: array[0] for name, array in outputs.items()}, detector.predict(image, threshold=THRESHOLD)[0]


def assert_equal(found, wanted) -> None:
    assert len(found) == len(wanted) > 0
    assert (found[:, 0] == wanted.labels).all()
    assert np.abs(found[:, 1] - wanted.scores).max() < 1e-6
    assert np.abs(found[:, 2:] - wanted.boxes).max() < 1e-3  # pixels


def test_objects_are_those_of_python(program, recorded):
    tensors, wanted = recorded
    assert_equal(parse(program, tensors), wanted)


def test_what_is_not_finite_is_no_object(program, recorded):
    tensors, wanted = recorded
    spoilt = {name: array.copy() for name, array in tensors.items()}
    best = 0
    if "pred_logits" in tensors:  # of this query come the best object, and no other above the threshold
        best = int(tensors["pred_logits"].max(1).argmax())
    for name, value in (("scores", np.nan), ("boxes", np.nan), ("pred_logits", np.nan), ("pred_boxes", np.inf)):
        if name not in spoilt:
            continue
        copy = {**spoilt, name: spoilt[name].copy()}
        copy[name][best] = value
        found = parse(program, copy)
        assert len(found) == len(wanted) - 1 and np.isfinite(found).all()


def test_nothing_and_much(program, recorded):
    tensors, wanted = recorded
    empty = {name: array[:0] for name, array in tensors.items()}
    assert len(parse(program, empty)) == 0
    tall = {name: np.concatenate([array] * 4) for name, array in tensors.items()}
    assert len(parse(program, tall)) == 4 * len(wanted)
    if "pred_logits" in tensors:  # no more than the official post-processing keeps
        assert len(parse(program, {name: np.concatenate([array] * 40) for name, array in tensors.items()}, 0)) <= 300


def test_classes_that_are_not_configured_are_left_out(program, recorded):
    tensors, wanted = recorded
    found = parse(program, tensors, classes=1)
    assert len(found) == (wanted.labels < 1).sum()
    if "labels" in tensors:
        labels = np.where(np.arange(len(tensors["labels"])) == 0, -1, tensors["labels"])
        assert len(parse(program, {**tensors, "labels": labels})) == len(wanted) - 1


def with_boxes(tensors: dict, change) -> dict:
    return {name: change(array) if "boxes" in name else array for name, array in tensors.items()}


@pytest.mark.parametrize(
    "change,part",
    [
        (lambda boxes: boxes[:, :3], "has another shape than expected"),
        (lambda boxes: boxes[None], "has another shape than expected"),
        (lambda boxes: boxes[:-1], "has another length than the other outputs"),
        (lambda boxes: boxes.astype(np.int32), "is no FP32"),
    ],
    ids=["three corners", "with a batch", "shorter", "integers"],
)
def test_other_outputs_are_refused(program, recorded, change, part):
    said = parse(program, with_boxes(recorded[0], change))
    assert isinstance(said, str) and part in said


def test_missing_outputs_are_named(program, recorded):
    said = parse(program, {name: array for name, array in recorded[0].items() if "boxes" not in name})
    assert "labels, boxes and scores are not among the outputs" in said


def test_the_sizes_input_is_that_of_the_network(program):
    data = b"orig_target_sizes 4 1 2\n" + bytes(16)
    result = subprocess.run([program, "1333", "800", "91", "0.3"], input=data, capture_output=True)
    assert (result.returncode, result.stdout.split()) == (0, [b"1333", b"800", b"1333", b"800"])


RECORD = {
    "backend": "tensorrt", "metadata": {"attention": "op", "op_version": 1, "class_names": ["car", "traffic light"]},
    "shapes": {"images": [[1, 3, 800, 1344], [1, 3, 800, 1344], [4, 3, 800, 1344]]},
    "tensors": {
        "images": {"type": "FLOAT", "shape": [-1, 3, 800, 1344]},
        "pred_logits": {"type": "FLOAT", "shape": [-1, 900, 2]}, "pred_boxes": {"type": "FLOAT", "shape": [-1, 900, 4]},
    },
}  # fmt: skip


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """What stands for an engine, with its record, and for the compiled libraries."""
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for name in ("deepstream", "tensorrt", "tensorrt-register"):
        (libraries / ld.native.LIBRARIES[name]).write_bytes(name.encode())
    monkeypatch.setenv(ld.native.PATH_VARIABLE, str(libraries))
    path = tmp_path / "detector.plan"
    path.write_bytes(b"ftrt" + bytes(100))

    def write(**changes):
        record = {**json.loads(json.dumps(RECORD)), **changes, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        Path(f"{path}.json").write_text(json.dumps(record))
        return path

    return write


def test_the_folder_has_all_that_nvinfer_needs(engine, tmp_path):
    report = write_folder(engine(), tmp_path / "out", 0.4, allow_unverified=True)
    folder = Path(report.path)
    config = configparser.ConfigParser()
    config.read(folder / "config_infer.txt")
    properties = dict(config["property"])
    for name in ("model-engine-file", "labelfile-path", "custom-lib-path"):  # relative to the configuration's folder
        assert (folder / properties[name]).is_file()
    assert (folder / "labels.txt").read_text().split("\n") == ["car", "traffic light", ""]
    assert properties["num-detected-classes"] == "2" and properties["batch-size"] == "4"
    assert properties["infer-dims"] == "3;800;1344"
    assert float(properties["net-scale-factor"]) == 1 / 255
    assert (properties["network-type"], properties["cluster-mode"], properties["model-color-format"]) == ("0", "4", "0")
    source = (ROOT / "plugins/deepstream/parser.cpp").read_text()
    assert f"bool {properties['parse-bbox-func-name']}(" in source
    assert config["class-attrs-all"]["pre-cluster-threshold"] == "0.4"
    assert len(list(folder.glob("*.so"))) == 3
    assert f"config-file-path={folder / 'config_infer.txt'}" in report.command
    assert "not proven" in report.warnings[0]


@pytest.mark.parametrize(
    "changes,part",
    [
        ({"shapes": {"images": [[1, 3, 480, 480], [1, 3, 800, 800], [1, 3, 1333, 1333]]}}, "images of several sizes"),
        ({"shapes": {"images": [[2, 3, 800, 1344]] * 2 + [[4, 3, 800, 1344]]}}, "takes batches of 2 to 4"),
        ({"tensors": {name: one for name, one in RECORD["tensors"].items() if name != "pred_boxes"}}, "no detector"),
        ({"backend": "tensorrt-rtx"}, "is an engine of tensorrt-rtx"),
    ],
)
def test_other_engines_are_refused(engine, tmp_path, changes, part):
    with pytest.raises(ld.LiteDetrError, match=part):
        write_folder(engine(**changes), tmp_path / "out", allow_unverified=True)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(engine, tmp_path):
    path = engine()
    with pytest.raises(ld.LiteDetrError, match="so it is not served"):
        write_folder(path, tmp_path / "out")
    (tmp_path / "libraries" / ld.native.LIBRARIES["deepstream"]).unlink()
    with pytest.raises(ld.LiteDetrError, match="liblitedetr_deepstream.so"):
        write_folder(path, tmp_path / "out", allow_unverified=True)
    Path(f"{path}.json").unlink()
    with pytest.raises(ld.LiteDetrError, match="has no detector.plan.json beside it"):
        write_folder(path, tmp_path / "out", allow_unverified=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(ld.LiteDetrError, match="exists, and a folder is not written over"):
        write_folder(path, tmp_path / "out")
