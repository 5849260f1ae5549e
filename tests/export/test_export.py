"""`ld.export_onnx`: what it makes, what it refuses, what it leaves behind."""

import json

import numpy as np
import onnx
import pytest

import litedetr_deploy as ld
from litedetr_deploy.artifact import METADATA_KEY
from litedetr_deploy.assets.shapes import CLASS_NAMES
from litedetr_deploy.verify.onnx import verify_onnx

pytestmark = pytest.mark.xdist_group("export")


@pytest.fixture(scope="module")
def model():
    return ld.load_model("lite-dino-shapes")


@pytest.fixture(scope="module")
def fixed(model, tmp_path_factory):
    """A verified export of fixed size without a mask, and its report."""
    path = tmp_path_factory.mktemp("fixed") / "model.onnx"
    stages = []
    report = ld.export_onnx(model, path, image_size=(256, 320), progress=stages.append)
    return path, report, stages


def test_verification_is_on_by_default_and_passes(fixed):
    path, report, stages = fixed
    assert report.passed and report.attention_nodes == 9
    quantities = {row.quantity for row in report.verdict.rows}
    assert {"logits", "boxes", "token scores", "identical rows, bit for bit", "identical rows: logits"} <= quantities
    assert any("batch of 3" in stage for stage in stages)
    written = json.loads(path.with_suffix(".json").read_text())
    assert written == report.to_dict()
    assert written["metadata"]["variant"] == "lite-dino-r26n-h3l1-2+1x3"


def test_metadata_is_in_the_file(fixed):
    path, _, _ = fixed
    (entry,) = [entry for entry in onnx.load(path).metadata_props if entry.key == METADATA_KEY]
    metadata = json.loads(entry.value)
    assert metadata["image_size"] == [256, 320] and metadata["attention"] == "op"
    assert metadata["class_names"] == list(CLASS_NAMES)
    assert metadata["verification"]["passed"]


def test_nothing_else_is_left_beside_the_model(fixed):
    path, _, _ = fixed
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.json", "model.onnx"]


def test_constants_of_a_fixed_size_are_folded(fixed):
    kinds = [node.op_type for node in onnx.load(fixed[0]).graph.node]
    assert kinds.count("Sin") == 3  # the decoder's; the encoder's positions are a constant
    assert "CumSum" not in kinds and "Resize" not in kinds


def test_verify_sees_a_changed_weight(fixed, model, tmp_path):
    """Verification is no formality: one matrix off by one part in a thousand fails it."""
    changed = onnx.load(fixed[0])
    (weight,) = [
        i for i in changed.graph.initializer if i.name == "detector.encoder.layers.1.self_attn.value_proj.weight"
    ]
    array = onnx.numpy_helper.to_array(weight) * np.float32(1.001)
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(changed, tmp_path / "changed.onnx")
    verification = verify_onnx(tmp_path / "changed.onnx", model)
    assert not verification.passed


def test_raw_outputs(model, tmp_path):
    path = tmp_path / "raw.onnx"
    ld.export_onnx(model, path, image_size=(256, 320), outputs="raw", verify=False)
    session = ld.create_session(path)
    assert [o.name for o in session.get_outputs()] == ["pred_logits", "pred_boxes"]
    assert [i.name for i in session.get_inputs()] == ["images"]
    found = ld.Detector(path).predict(np.zeros((40, 60, 3), np.uint8))
    assert found[0].boxes.shape == (300, 4)


@pytest.mark.parametrize(
    "wish,says",
    [
        ({"attention": "fused"}, "attention is 'fused'"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"outputs": "boxes"}, "outputs is 'boxes'"),
        ({"opset": 16}, "opset is 16"),
        ({"attention": "gridsample", "opset": 20}, "nearest"),
        ({"image_size": (0, 640)}, "0x640"),
        ({"calibration": "images"}, "int8"),
    ],
)
def test_wishes_that_cannot_be_met(model, tmp_path, wish, says):
    with pytest.raises(ld.LiteDetrError, match=says):
        ld.export_onnx(model, tmp_path / "model.onnx", **wish)
    assert not list(tmp_path.iterdir())


def test_fewer_tokens_than_queries(tmp_path):
    model = ld.load_model(variant="lite-dino-r26n", num_queries=100)
    with pytest.raises(ld.LiteDetrError, match="85 feature tokens, fewer than the 100 queries"):
        ld.export_onnx(model, tmp_path / "model.onnx", image_size=(64, 64))


def test_an_interruption_leaves_nothing(model, tmp_path):
    def interrupt(stage):
        assert len(list(tmp_path.iterdir())) == 2  # temporary names
        if stage == "translate to ONNX":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ld.export_onnx(model, tmp_path / "model.onnx", image_size=(256, 320), progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder(model, tmp_path):
    with pytest.raises(ld.LiteDetrError, match="cannot be written"):
        ld.export_onnx(model, tmp_path / "absent" / "model.onnx", image_size=(256, 320), verify=False)


def test_verify_refuses_what_it_did_not_make(model, tmp_path):
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ld.LiteDetrError, match="not an ONNX model"):
        verify_onnx(tmp_path / "text.onnx", model)
