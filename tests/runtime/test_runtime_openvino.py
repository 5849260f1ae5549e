"""OpenVINO behind the session interface: the same as ONNX Runtime on the same file, several runs at a time."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

import litedetr_deploy as ld
from litedetr_deploy.errors import LiteDetrError, Notice
from litedetr_deploy.machine import computes_bfloat16
from litedetr_deploy.ops import native
from litedetr_deploy.runtime.session import OnnxSession, open_session

from ..ops import cases
from .tiny_artifact import LABELS, METADATA, save_detector

pytest.importorskip("openvino")
from litedetr_deploy.runtime.openvino import OpenVinoSession


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "litedetr-deploy" / "openvino"


def make_feed(batch=2, size=(64, 96), seed=0):
    pixels = np.random.default_rng(seed).random((batch, 3, *size), np.float32)
    return {"images": pixels, "orig_target_sizes": np.array([[200, 100]] * batch, np.int64)}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", (False, True))
def test_equals_onnx_runtime_on_the_same_file(tmp_path, mask):
    path = save_detector(tmp_path / "model.onnx", pixel_mask=mask)
    session, other = OpenVinoSession(path), OnnxSession(path)
    feed = make_feed()
    if mask:
        feed["pixel_mask"] = np.arange(2 * 64 * 96).reshape(2, 64, 96) % 3 == 0
    assert_same(session.run(feed), other.run(feed))
    assert session.metadata == other.metadata and session.metadata["variant"] == METADATA["variant"]
    assert session.inputs["images"] == (None, 3, 64, 96) and set(session.outputs) == set(other.outputs)


def test_dynamic_sizes_and_a_batch_of_0(tmp_path):
    path = save_detector(tmp_path / "model.onnx", size=None)
    session, other = OpenVinoSession(path), OnnxSession(path)
    assert session.inputs["images"] == (None, 3, None, None)
    for size in ((64, 96), (80, 72)):
        assert_same(session.run(make_feed(size=size)), other.run(make_feed(size=size)))
    assert {k: v.shape for k, v in session.run(make_feed(0)).items()} == {
        k: v.shape for k, v in other.run(make_feed(0)).items()
    }


def test_what_a_run_gives_is_kept_by_the_next_unless_told_otherwise(tmp_path):
    session = OpenVinoSession(save_detector(tmp_path / "model.onnx"))
    first, second = (make_feed(1, seed=seed) for seed in (1, 2))
    kept, shared = session.run(first), session.run(first, copy=False)
    before = kept["scores"].copy()
    assert (shared["scores"] == before).all()
    assert (session.run(second)["scores"] != before).any()
    assert (kept["scores"] == before).all()


@pytest.mark.parametrize("throughput", (False, True))
def test_a_stream_keeps_its_order(tmp_path, throughput):
    session = OpenVinoSession(save_detector(tmp_path / "model.onnx"), threads=2, throughput=throughput)
    feeds = [make_feed(1, seed=seed) for seed in range(9)]
    for found, feed in zip(session.stream(iter(feeds)), feeds, strict=True):
        np.testing.assert_allclose(found["scores"][:, 1], feed["images"].mean((1, 2, 3)), rtol=1e-5)


def test_a_stream_that_is_left_early_can_be_started_again(tmp_path):
    session = OpenVinoSession(save_detector(tmp_path / "model.onnx"), throughput=True)
    stream = session.stream(make_feed(1, seed=seed) for seed in range(9))
    next(stream)
    stream.close()
    assert len(list(session.stream(make_feed(1, seed=seed) for seed in range(4)))) == 4


def test_a_detector_takes_images_ahead_and_tells_them_apart(tmp_path):
    path = save_detector(tmp_path / "model.onnx")
    detector = ld.Detector(path, runtime="openvino", threads=2, throughput=True)
    images = [Image.new("RGB", (96 + shade, 64), (shade,) * 3) for shade in range(0, 250, 25)]
    for image, found in zip(images, detector.predict(images, threshold=0), strict=True):
        shade = image.getpixel((0, 0))[0] / 255
        place = found.labels.tolist().index(LABELS[1])
        assert found.scores[place] == pytest.approx(shade, abs=1e-5)
        assert found.boxes[place].tolist() == [0, 0, image.width, 64]


def op_model(path):
    model = cases.make_op_model(cases.Shape())
    onnx.save(model, path)
    return path


def test_the_op_without_its_library(tmp_path, monkeypatch):
    def missing(name):
        raise FileNotFoundError(f"the {name!r} library is not here")

    monkeypatch.setattr(native, "library", missing)
    with pytest.raises(LiteDetrError, match="holds the fused attention ops, .* the 'openvino' library is not here"):
        OpenVinoSession(op_model(tmp_path / "model.onnx"))
    assert OpenVinoSession(save_detector(tmp_path / "gather.onnx")).outputs  # needs none


def test_another_openvino_is_named(tmp_path, monkeypatch):
    entry = Path(__file__).parents[2] / "plugins" / "openvino" / "entry.cpp"
    if not (compiler := shutil.which("c++")):
        pytest.skip("no C++ compiler is installed")
    library = tmp_path / "liblitedetr_openvino.so"
    command = [compiler, "-std=c++17", "-shared", "-fPIC", '-DLITEDETR_OPENVINO_VERSION="2025.0.0"', str(entry)]
    subprocess.run([*command, "-o", str(library), "-ldl"], check=True)
    monkeypatch.setattr(native, "library", lambda name: library)
    with pytest.raises(LiteDetrError, match=r"compiled for OpenVINO 2025\.0\.0 and this is OpenVINO 20"):
        OpenVinoSession(op_model(tmp_path / "model.onnx"))


def test_bfloat16_where_the_processor_has_it(tmp_path):
    path = save_detector(tmp_path / "model.onnx")
    if computes_bfloat16():
        assert OpenVinoSession(path, precision="bf16").run(make_feed()).keys() == {"labels", "boxes", "scores"}
    else:
        with pytest.raises(LiteDetrError, match="does not compute in it .*Use 'fp32'"):
            OpenVinoSession(path, precision="bf16")


def test_compiled_models_are_kept(tmp_path, cache):
    path = save_detector(tmp_path / "model.onnx")
    feed = make_feed()
    wanted = OpenVinoSession(path).run(feed)
    assert [file.suffix for file in cache.iterdir()] == [".blob"]
    assert_same(OpenVinoSession(path).run(feed), wanted)
    OpenVinoSession(path.read_bytes())
    assert len(list(cache.iterdir())) == 1  # what has no file is compiled each time


def test_a_cache_that_cannot_be_used_is_no_reason_to_stop(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(Notice, match="the compiled model is not kept"):
        assert OpenVinoSession(save_detector(tmp_path / "model.onnx")).outputs


def cut(path):
    path.write_bytes(path.read_bytes()[:300])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", (cut, empty))
def test_a_damaged_file(tmp_path, damage):
    path = save_detector(tmp_path / "model.onnx")
    damage(path)
    with pytest.raises(LiteDetrError, match="model.onnx is not an ONNX model, or a damaged one"):
        OpenVinoSession(path)


def test_an_operator_that_openvino_does_not_have(tmp_path):
    node = helper.make_node("Unheard", ["x"], ["y"], domain="else.where")
    values = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([node], "g", *([value] for value in values))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("else.where", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "model.onnx")
    with pytest.raises(LiteDetrError, match=r"OpenVINO cannot load .*else\.where\.Unheard.*Run it in ONNX Runtime"):
        OpenVinoSession(tmp_path / "model.onnx")


def test_wrong_inputs_are_named(tmp_path):
    session = OpenVinoSession(save_detector(tmp_path / "model.onnx"))
    with pytest.raises(LiteDetrError, match="the input 'orig_target_sizes' of .* is missing; given: images"):
        session.run({"images": make_feed()["images"]})
    with pytest.raises(LiteDetrError, match="OpenVINO fails to run .*incompatible"):
        session.run(make_feed(size=(32, 32)))
    assert session.run(make_feed()).keys() == {"labels", "boxes", "scores"}  # and goes on


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"runtime": "openvin"}, "runtime is 'openvin'; .*Did you mean 'openvino'"),
        ({"runtime": "openvino", "providers": ["CPUExecutionProvider"]}, "execution providers are ONNX Runtime's"),
        ({"runtime": "openvino", "precision": "fp8"}, "precision is 'fp8'; OpenVINO computes in fp32 or bf16"),
        ({"precision": "bf16"}, "precision is 'bf16', which OpenVINO alone"),
    ),
)
def test_options_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(LiteDetrError, match=message):
        open_session(save_detector(tmp_path / "model.onnx"), **options)


def test_an_engine_is_tensorrts(tmp_path):
    with pytest.raises(LiteDetrError, match=r"TensorRT runs the engine .*model.plan"):
        open_session(tmp_path / "model.plan", runtime="openvino")


def test_where_openvino_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(LiteDetrError, match=r"pip install litedetr-deploy\[openvino\]"):
        OpenVinoSession(save_detector(tmp_path / "model.onnx"))
