"""The PyTorch models against the official implementation's outputs (tests/golden/README.md)."""

import json
import zlib

import numpy as np
import pytest
import torch

from litedetr_deploy.model.attention import DeformableAttention

from ..conftest import CASES, FAST_CASES, GOLDEN, Golden, official_state_dict

# The official code, run with other threads and kernels, differs from its own golden values by up to 1.2e-5
# (memory), 2.5e-4 (logits) and 1.6e-5 (boxes); each bound is about twenty times that.
SCORE_TOLERANCE, MEMORY_TOLERANCE, LOGIT_TOLERANCE, BOX_TOLERANCE = 1e-4, 2e-4, 5e-3, 3e-4


def assert_same_proposals(indices: np.ndarray, golden: Golden) -> None:
    """A free-running top-k may swap tokens whose official scores are equal to rounding, and no others."""
    wanted, scores = golden.outputs["topk_idx"], golden.outputs["enc_score"]
    rows, places = np.nonzero(indices != wanted)
    gaps = np.abs(scores[rows, indices[rows, places]] - scores[rows, wanted[rows, places]])
    assert (gaps < 2e-4).all(), gaps.max()


def run(model, golden: Golden, topk_indices=None) -> dict[str, np.ndarray]:
    mask = torch.from_numpy(golden.pixel_mask) if golden.pixel_mask.any() else None
    with torch.inference_mode():
        outputs = model(torch.from_numpy(golden.images), mask, topk_indices)
    return {name: value.numpy() for name, value in outputs.items()}


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_recipe_makes_the_official_weights(name):
    listed = json.loads((GOLDEN / f"state_dict_{name}.json").read_text())["tensors"]
    for key, tensor in official_state_dict(name).items():
        assert zlib.crc32(tensor.numpy().astype("<f4").tobytes()) == listed[key][1], key


@pytest.mark.parametrize(
    "name,case", [pytest.param(*case, marks=[] if case in FAST_CASES else pytest.mark.slow) for case in CASES]
)
def test_detector_matches_official_outputs(model_of, name, case):
    golden = Golden(name, case)
    model = model_of(name)
    free = run(model, golden)
    assert np.abs(free["proposal_scores"] - golden.outputs["enc_score"]).max() < SCORE_TOLERANCE
    assert np.abs(free["memory"][:, ::36] - golden.outputs["memory_sub"]).max() < MEMORY_TOLERANCE
    norms = np.linalg.norm(free["memory"], axis=-1)
    assert np.abs(norms - golden.outputs["memory_tok_l2"]).max() < MEMORY_TOLERANCE * norms.max()
    assert_same_proposals(free["topk_indices"], golden)

    forced = run(model, golden, torch.from_numpy(golden.outputs["topk_idx"]).long())
    assert np.abs(forced["pred_logits"] - golden.outputs["pred_logits"]).max() < LOGIT_TOLERANCE
    assert np.abs(forced["pred_boxes"] - golden.outputs["pred_boxes"]).max() < BOX_TOLERANCE


def test_an_empty_mask_changes_nothing(model_of):
    golden = Golden("lite_dino_r50_h3l1_2p1x3", "single")
    model = model_of(golden.name)
    without = run(model, golden)
    with torch.inference_mode():
        mask = torch.zeros(golden.pixel_mask.shape, dtype=torch.bool)
        masked = model(torch.from_numpy(golden.images), mask, torch.from_numpy(without["topk_indices"]))
    assert np.abs(masked["memory"].numpy() - without["memory"]).max() < MEMORY_TOLERANCE
    assert np.abs(masked["pred_boxes"].numpy() - without["pred_boxes"]).max() < BOX_TOLERANCE


def _module_cases():
    with np.load(GOLDEN / "attention_module.npz") as file:
        return json.loads(str(file["cases_json"]))["cases"]


@pytest.mark.parametrize("case", _module_cases(), ids=lambda case: case["case"])
def test_attention_module_matches_official_outputs(case):
    with np.load(GOLDEN / "attention_module.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "cases_json"}
    prefix = f"{case['weights']}__"
    switches = {name: case["switches"][name] for name in ("key_aware", "proj_key", "same_loc")}
    module = DeformableAttention(dim=64, num_heads=4, num_levels=4, num_points=4, **switches)
    module.load_state_dict(
        {
            name.removeprefix(prefix): value
            for name, value in arrays.items()
            # The official module has a query projection even where nothing reads it.
            if name.startswith(prefix) and (switches["key_aware"] or "query_proj" not in name)
        }
    )
    with torch.inference_mode():
        output = module(
            arrays["in__query"],
            arrays[f"in__{case['ref']}"],
            arrays["in__input_flatten"],
            arrays["in__spatial_shapes"],
            arrays["in__padding_mask"] if case["padding_mask"] else None,
        )
    assert (output - arrays[f"out__{case['case']}"]).abs().max() < 1e-5
