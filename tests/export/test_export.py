"""`ld.export_onnx`: what it makes, what it refuses, what it leaves behind."""

import json

import numpy as np
import onnx
import pytest

import litedetr_deploy as ld
from litedetr_deploy.export.verify import verify_onnx
from litedetr_deploy.runtime.session import METADATA_KEY

pytestmark = pytest.mark.xdist_group("export")
NAME = "lite_dino_r50_h3l1_2p1x3"


@pytest.fixture(scope="module")
def fixed(model_of, tmp_path_factory):
    """A verified export of fixed size without a mask, and its report."""
    path = tmp_path_factory.mktemp("fixed") / "model.onnx"
    stages = []
    report = ld.export_onnx(model_of(NAME), path, image_size=(256, 320), progress=stages.append)
    return path, report, stages


def test_verification_is_on_by_default_and_passes(fixed):
    path, report, stages = fixed
    assert report.passed and report.attention_nodes == 12
    quantities = {row["quantity"] for row in report.verification}
    assert {"logits", "boxes", "token scores", "identical rows, bit for bit", "identical rows: logits"} <= quantities
    assert any("batch of 3" in stage for stage in stages)
    written = json.loads(path.with_suffix(".json").read_text())
    assert written == report.to_dict()
    assert written["metadata"]["variant"] == "lite-dino-r50-h3l1-2+1x3"


def test_metadata_is_in_the_file(fixed):
    path, _, _ = fixed
    (entry,) = [entry for entry in onnx.load(path).metadata_props if entry.key == METADATA_KEY]
    metadata = json.loads(entry.value)
    assert metadata["image_size"] == [256, 320] and metadata["attention"] == "op"
    assert metadata["class_names"][17] == "cat"  # COCO's category ids
    assert metadata["verification"]["passed"]


def test_nothing_else_is_left_beside_the_model(fixed):
    path, _, _ = fixed
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.json", "model.onnx"]


def test_constants_of_a_fixed_size_are_folded(fixed):
    kinds = [node.op_type for node in onnx.load(fixed[0]).graph.node]
    assert kinds.count("Sin") == 6  # the decoder's; the encoder's positions are a constant
    assert "CumSum" not in kinds and "Resize" not in kinds


def test_verify_sees_a_changed_weight(fixed, model_of, tmp_path):
    """Verification is no formality: one matrix off by one part in a thousand fails it."""
    model = onnx.load(fixed[0])
    (weight,) = [i for i in model.graph.initializer if i.name == "detector.encoder.layers.1.self_attn.value_proj.weight"]
    array = onnx.numpy_helper.to_array(weight) * np.float32(1.001)
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, tmp_path / "changed.onnx")
    verification = verify_onnx(tmp_path / "changed.onnx", model_of(NAME))
    assert not verification.passed


def test_raw_outputs(model_of, tmp_path):
    path = tmp_path / "raw.onnx"
    ld.export_onnx(model_of(NAME), path, image_size=(256, 320), outputs="raw", verify=False)
    session = ld.create_session(path)
    assert [o.name for o in session.get_outputs()] == ["pred_logits", "pred_boxes"]
    assert [i.name for i in session.get_inputs()] == ["images"]
    found = ld.Detector(path).predict(np.zeros((40, 60, 3), np.uint8))
    assert found[0].boxes.shape == (300, 4)


@pytest.mark.parametrize(
    "wish,says",
    [
        ({"attention": "fused"}, "attention is 'fused'"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
        ({"outputs": "boxes"}, "outputs is 'boxes'"),
        ({"opset": 16}, "opset is 16"),
        ({"attention": "gridsample", "opset": 20}, "nearest"),
        ({"image_size": (0, 640)}, "0x640"),
        ({"image_size": (64, 64)}, "fewer than the 900 queries"),
        ({"calibration": "images"}, "int8"),
    ],
)
def test_wishes_that_cannot_be_met(model_of, tmp_path, wish, says):
    with pytest.raises(ld.LiteDetrError, match=says):
        ld.export_onnx(model_of(NAME), tmp_path / "model.onnx", **wish)
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(model_of, tmp_path):
    def interrupt(stage):
        assert len(list(tmp_path.iterdir())) == 2  # temporary names
        if stage == "translate to ONNX":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ld.export_onnx(model_of(NAME), tmp_path / "model.onnx", image_size=(256, 320), progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder(model_of, tmp_path):
    with pytest.raises(ld.LiteDetrError, match="cannot be written"):
        ld.export_onnx(model_of(NAME), tmp_path / "absent" / "model.onnx", image_size=(256, 320), verify=False)


def test_verify_refuses_what_it_did_not_make(model_of, tmp_path):
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ld.LiteDetrError, match="not an ONNX model"):
        verify_onnx(tmp_path / "text.onnx", model_of(NAME))
