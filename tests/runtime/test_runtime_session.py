import contextlib
import warnings

import numpy as np
import onnxruntime
import pytest

import litedetr_deploy as ld
from litedetr_deploy.errors import Notice
from litedetr_deploy.machine import usable_cores
from litedetr_deploy.ops import native
from litedetr_deploy.runtime.session import OnnxSession, open_session, read_metadata

from .tiny_artifact import save_detector, save_raw_detector, save_with_attention_op


@pytest.fixture
def no_library(monkeypatch):
    def missing(name):
        raise FileNotFoundError(f"The library {name} was not built. Build it.")

    monkeypatch.setattr(native, "library", missing)


def test_a_model_of_standard_ops_needs_no_library(tmp_path, no_library):
    session = ld.create_session(save_detector(tmp_path / "model.onnx"))
    assert isinstance(session, onnxruntime.InferenceSession)
    assert read_metadata(session)["variant"] == "lite-dino-r50-h3l1-2+1x3"


def test_bytes_and_threads(tmp_path):
    model = save_detector(tmp_path / "model.onnx").read_bytes()
    assert ld.create_session(model, threads=1).get_session_options().intra_op_num_threads == 1
    with pytest.raises(ld.LiteDetrError, match="threads is 0"):
        ld.create_session(model, threads=0)


def test_onnx_session_describes_the_artifact(tmp_path):
    session = OnnxSession(save_detector(tmp_path / "model.onnx", pixel_mask=True))
    assert session.inputs["images"][1:] == (3, 64, 96)
    assert set(session.inputs) == {"images", "orig_target_sizes", "pixel_mask"}
    assert session.outputs == ("labels", "boxes", "scores")
    assert session.metadata["attention"] == "gather"


def test_missing_library_is_named_with_its_remedy(tmp_path, no_library):
    path = save_with_attention_op(tmp_path / "model.onnx")
    with pytest.raises(ld.LiteDetrError, match=r"model\.onnx holds the fused attention ops.*was not built.*gather"):
        ld.create_session(path)


def test_library_that_does_not_load(tmp_path, monkeypatch):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(native, "library", lambda name: broken)
    ld.create_session(save_detector(tmp_path / "standard.onnx"))
    with pytest.raises(ld.LiteDetrError, match=r"cannot use the op library .*broken\.so"):
        ld.create_session(save_with_attention_op(tmp_path / "model.onnx"))


def test_other_op_version(tmp_path, no_library):
    path = save_detector(tmp_path / "model.onnx", attention="op", op_version=7)
    with pytest.raises(ld.LiteDetrError, match="version 7 of the attention ops; this package has version 1"):
        ld.create_session(path)


def test_unknown_op_of_ours(tmp_path):
    try:
        native.library("onnxruntime")
    except FileNotFoundError:
        pytest.skip("the ONNX Runtime library is not built")
    path = save_with_attention_op(tmp_path / "model.onnx", "NextYearsAttn")
    with pytest.raises(ld.LiteDetrError, match="does not have.*NextYearsAttn"):
        ld.create_session(path)


@pytest.mark.parametrize("content", [b"", b"This is a text file.\n" * 30, b"\x89PNG\r\n\x1a\n" + bytes(range(256))])
def test_not_an_onnx(tmp_path, content, capfd):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ld.LiteDetrError, match=r"model\.onnx is not an ONNX model, or a damaged one"):
        ld.create_session(path)
    assert capfd.readouterr() == ("", "")


def test_truncated_onnx(tmp_path):
    path = save_detector(tmp_path / "model.onnx")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ld.LiteDetrError, match="damaged"):
        ld.create_session(path)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(ld.LiteDetrError, match=r"gone\.onnx does not exist"):
        ld.create_session(tmp_path / "gone.onnx")
    with pytest.raises(ld.LiteDetrError, match="is a directory"):
        ld.create_session(tmp_path)


def test_provider_that_is_not_there(tmp_path):
    with pytest.raises(ld.LiteDetrError, match="no execution provider 'MoonExecutionProvider'"):
        ld.create_session(save_detector(tmp_path / "model.onnx"), providers=["MoonExecutionProvider"])


def test_onnxruntime_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"x")
    with pytest.raises(ld.LiteDetrError, match=r"pip install litedetr-deploy\[onnxruntime\]"):
        ld.create_session(path)


def test_metadata_that_is_not_json(tmp_path):
    import onnx

    path = save_detector(tmp_path / "model.onnx")
    model = onnx.load(path)
    model.metadata_props[0].value = "{"
    onnx.save(model, path)
    with pytest.raises(ld.LiteDetrError, match="not a JSON object"):
        ld.create_session(path)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"outputs": "raw"}, "outputs are 'raw', pred_boxes, pred_logits, and the graph has boxes, labels, scores"),
        ({"image_size": [64, 64]}, r"image_size is \[64, 64\], and the graph has images of 64x96"),
        ({"image_size": None}, "image_size is dynamic, and the graph has images of 64x96"),
        ({"class_names": 7}, "class names in the metadata of .* are '7'; they must be a list of texts"),
        ({"class_names": ["a", 7]}, "must be a list of texts"),
    ],
)
def test_metadata_that_contradicts_the_graph(tmp_path, metadata, message):
    path = save_detector(tmp_path / "model.onnx", **metadata)
    for open_it in (ld.create_session, OnnxSession):
        with pytest.raises(ld.LiteDetrError, match=message):
            open_it(path)


def test_class_names_and_a_mask_that_the_graph_does_not_have(tmp_path):
    logits, boxes = np.zeros((2, 3), np.float32), np.full((2, 4), 0.5, np.float32)
    path = save_raw_detector(tmp_path / "model.onnx", logits, boxes, class_names=["a", "b"])
    with pytest.raises(ld.LiteDetrError, match="class_names are 2, and the graph has 3 classes"):
        ld.create_session(path)
    path = save_raw_detector(tmp_path / "model.onnx", logits, boxes, class_names=None, pixel_mask=True)
    with pytest.raises(ld.LiteDetrError, match="pixel_mask is True, and the graph has no such input"):
        ld.create_session(path)


def test_metadata_that_agrees(tmp_path):
    fixed = save_detector(tmp_path / "fixed.onnx", image_size=[64, 96], outputs="detections")
    dynamic = save_detector(tmp_path / "dynamic.onnx", size=None, image_size=None)
    assert OnnxSession(fixed).metadata["image_size"] == [64, 96] and OnnxSession(dynamic).metadata["image_size"] is None


def test_a_batch_of_0_gives_empty_arrays(tmp_path):
    feed = {"images": np.zeros((0, 3, 64, 96), np.float32), "orig_target_sizes": np.zeros((0, 2), np.int64)}
    output = OnnxSession(save_detector(tmp_path / "model.onnx")).run(feed)
    assert {name: (value.shape, value.dtype) for name, value in output.items()} == {
        "labels": ((0, 3), np.int64),
        "boxes": ((0, 3, 4), np.float32),
        "scores": ((0, 3), np.float32),
    }


def test_more_threads_than_cores_are_not_started(tmp_path):
    with pytest.warns(Notice, match="100000 threads are asked for"):
        session = ld.create_session(save_detector(tmp_path / "model.onnx"), threads=100_000)
    assert session.get_session_options().intra_op_num_threads == usable_cores()


@pytest.mark.parametrize("key", ["outputs", "image_size", "op_version", "class_names", "attention", "verification"])
@pytest.mark.parametrize("value", [7, "text", [], [[]], {}, {"verdict": []}, True, None, -1.5], ids=repr)
def test_metadata_of_any_kind_gives_a_session_or_says_what_is_wrong(tmp_path, key, value):
    path = save_detector(tmp_path / "model.onnx", **{key: value})
    with contextlib.suppress(ld.LiteDetrError), warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        ld.Detector(path).predict(np.zeros((9, 9, 3), np.uint8))


@pytest.mark.parametrize(
    "artifact, options, message",
    [
        ("m.plan", {"device": "cpu"}, "an engine runs on the GPU that CUDA numbers 0"),
        ("m.plan", {"device": "cuda:1"}, "set CUDA_VISIBLE_DEVICES"),
        ("m.onnx", {"device": "cuda", "providers": ["CPUExecutionProvider"]}, "Leave one out"),
        ("m.onnx", {"device": "cuda:x"}, "must be 'cpu', 'cuda', or a GPU by its number"),
        ("m.onnx", {"device": "cuda", "runtime": "openvino"}, "OpenVINO runs on the CPU here"),
    ],
)
def test_devices_that_a_runtime_does_not_have(artifact, options, message):
    with pytest.raises(ld.LiteDetrError, match=message):
        open_session(artifact, **options)
