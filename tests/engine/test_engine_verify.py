"""The comparison of an engine with its ONNX model, with ONNX Runtime in the place of the engine."""

import numpy as np
import pytest

from litedetr_deploy.artifact import CANNOT_TELL, FAILED, VERIFIED
from litedetr_deploy.runtime.session import OnnxSession
from litedetr_deploy.verify.engine import verify_engine

from ..runtime.tiny_artifact import NAMES, save_detector, save_raw_detector

LOGITS = np.full((20, len(NAMES)), -9, np.float32)
LOGITS[0, 1], LOGITS[1, 18] = 3, 2
BOXES = np.full((20, 4), 0.5, np.float32) * np.linspace(0.2, 1, 20, dtype=np.float32)[:, None]
IMAGE = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)


class Changed:
    """A session whose outputs `change` has changed."""

    def __init__(self, session, change):
        self.inputs, self.session, self.change = session.inputs, session, change
        self.batches = []

    def run(self, feed):
        self.batches.append(len(feed["images"]))
        output = {name: value.copy() for name, value in self.session.run(feed).items()}
        self.change(output)
        return output


def failed(session, reference, precision="fp32", batch=(1, 4), size=(64, 96)):
    verdict = verify_engine(session, reference, precision, batch, [size], [IMAGE])
    assert all(np.isfinite(row.difference) for row in verdict.rows)
    return [(row.case, row.quantity) for row in verdict.rows if not row.passed]


@pytest.fixture
def model(tmp_path):
    return OnnxSession(save_detector(tmp_path / "model.onnx", pixel_mask=True))


def test_the_same_passes(model):
    same = Changed(model, lambda output: None)
    assert failed(same, model) == []
    assert same.batches == [1, 1, 3]  # the image, the noise, and both with the image again


@pytest.mark.parametrize("batch, batches", [((1, 1), [1, 1]), ((2, 2), [2]), ((1, 2), [1, 1, 2]), ((4, 8), [4])])
def test_batches_that_the_engine_takes(model, batch, batches):
    session = Changed(model, lambda output: None)
    assert failed(session, model, batch=batch) == []
    assert session.batches == batches


def test_raw_outputs(tmp_path):
    model = OnnxSession(save_raw_detector(tmp_path / "model.onnx", LOGITS, BOXES))
    other = OnnxSession(save_raw_detector(tmp_path / "other.onnx", LOGITS, BOXES + np.float32(0.02)))
    assert failed(model, model) == []
    assert ("64x96, image 1", "boxes of confident detections") in failed(other, model)


def test_shifted_boxes_fail(model):
    def shift(output):
        output["boxes"] += 2  # pixels of 96: 2 %

    assert ("64x96, image 1", "boxes of confident detections") in failed(Changed(model, shift), model)
    assert failed(Changed(model, shift), model, precision="int8") == []


def test_another_label_fails(model):
    def rename(output):
        output["labels"][:] = 7

    assert ("64x96, noise", "boxes of confident detections") in failed(Changed(model, rename), model)


def test_scores_and_nan_fail(model):
    def lower(output):
        output["scores"] -= 0.02

    assert ("64x96, image 1", "scores by rank") in failed(Changed(model, lower), model)

    def spoil(output):
        output["scores"][:] = np.nan

    verdict = verify_engine(Changed(model, spoil), model, "fp32", (1, 1), [(64, 96)], [IMAGE])
    assert verdict.status == FAILED and "scores: holds NaN in the artifact only" in verdict.why


def test_equal_images_of_a_batch_must_be_equal(model):
    def spoil_third(output):
        output["boxes"][2:] += 50

    found = failed(Changed(model, spoil_third), model)
    assert ("64x96, batch of 3, rows 1 and 3", "boxes of confident detections") in found
    assert {case for case, _ in found} == {"64x96, batch of 3, rows 1 and 3", "64x96, batch of 3, row 3"}


def test_what_finds_the_same_in_noise_cannot_tell(model, tmp_path):
    blank = OnnxSession(save_raw_detector(tmp_path / "model.onnx", LOGITS, BOXES))
    verdict = verify_engine(blank, blank, "fp32", (1, 1), [(64, 96)], [IMAGE])
    assert verdict.status == CANNOT_TELL and "the same in an image and in noise" in str(verdict)
    white = np.full((50, 60, 3), 255, np.uint8)
    assert verify_engine(model, model, "fp32", (1, 1), [(64, 96)], [white]).status == VERIFIED
