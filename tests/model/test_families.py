"""Deformable DETR, H-DETR and Swin against the official implementations' outputs (tests/golden/README.md)."""

import json

import numpy as np
import pytest
import torch

import litedetr_deploy as ld

from ..conftest import GOLDEN
from . import recipe
from .test_parity import BOX_TOLERANCE, LOGIT_TOLERANCE, MEMORY_TOLERANCE, SCORE_TOLERANCE

NAMES = {"deformable_detr_r50": "deformable-detr-r50", "h_detr_swin_t": "h-detr-swin-t"}


def official_state_dict(name: str) -> dict[str, torch.Tensor]:
    shapes = json.loads((GOLDEN / f"keys_{name}.json").read_text())
    index = {key for key in shapes if key.endswith("relative_position_index")}
    arrays = recipe.make_weights({key: tuple(shape) for key, shape in shapes.items() if key not in index})
    # A buffer that follows from the window's size; nothing reads it.
    return {key: torch.zeros(shapes[key]) if key in index else torch.from_numpy(arrays[key]) for key in shapes}


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """Model, inputs and official outputs."""
    model = ld.load_model(official_state_dict(request.param))
    assert model.config.name == NAMES[request.param]
    with np.load(GOLDEN / f"{request.param}_batch2.npz") as file:
        return model, [torch.from_numpy(array) for array in recipe.batch()], dict(file)


def largest(ours: torch.Tensor, official: np.ndarray) -> float:
    return np.abs(ours.numpy() - official).max()


def test_detector_matches_official_outputs(case):
    model, inputs, official = case
    with torch.inference_mode():
        outputs = model(*inputs, torch.from_numpy(official["topk_indices"]).long())
    assert largest(outputs["proposal_scores"], official["proposal_scores"]) < SCORE_TOLERANCE
    assert largest(outputs["memory"][:, ::24], official["memory"]) < MEMORY_TOLERANCE
    assert largest(outputs["pred_logits"][:, ::5], official["pred_logits"]) < LOGIT_TOLERANCE
    assert largest(outputs["pred_boxes"], official["pred_boxes"]) < BOX_TOLERANCE
    # The free choice differs only between tokens that score the same to rounding.
    scores = torch.from_numpy(official["proposal_scores"])
    free = scores.gather(1, outputs["proposal_scores"].topk(300)[1])
    assert (free - scores.topk(300)[0]).abs().max() < 2 * SCORE_TOLERANCE


def test_swin_matches_official_maps(case):
    model, (images, _), official = case
    if "map0" not in official:
        pytest.skip("a ResNet")
    with torch.inference_mode():
        maps = model.backbone(images)
    for i, ours in enumerate(maps):
        assert largest(ours[:, ::16], official[f"map{i}"]) < MEMORY_TOLERANCE


def test_one_to_many_queries_are_left_out():
    model = ld.load_model(official_state_dict("h_detr_swin_t"), "h-detr-swin-t")
    assert model.tgt_embed.weight.shape == (300, 256)
