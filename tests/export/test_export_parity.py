"""Exported graphs in ONNX Runtime against the official implementation's outputs."""

import numpy as np
import onnx
import pytest

import litedetr_deploy as ld
from litedetr_deploy.model.deployed import IMAGENET_MEAN, IMAGENET_STD, PROBES
from litedetr_deploy.ops import schema

from ..conftest import CASES, Golden
from ..model.test_parity import BOX_TOLERANCE, LOGIT_TOLERANCE, SCORE_TOLERANCE, assert_same_proposals

OUTPUTS = ["labels", "boxes", "scores"]


def run_probed(path, golden: Golden) -> dict[str, np.ndarray]:
    """Outputs and probes of the graph on the golden images; these are normalised, and the graph normalises."""
    model = onnx.load(path)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in PROBES)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    sizes = golden.outputs["target_sizes"][:, ::-1]  # official: (height, width)
    feed = {"images": golden.images * std + mean, "orig_target_sizes": sizes, "pixel_mask": golden.pixel_mask}
    names = [*OUTPUTS, *PROBES]
    return dict(zip(names, ld.create_session(model.SerializeToString(), threads=1).run(names, feed)))


# Every export of an R50 takes most of a minute: other schedules are checked with the op alone, whose graphs differ from
# that of (2+1)x3 in the layers' kinds; in standard ops the padded batch stands for a single image.
GATHERED = [case for case in CASES if "2p1x3" in case[0] and case[1] == "batch2"]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    # One process makes and uses all exports of a variant.
    "name,case,attention",
    [
        pytest.param(*case, attention, marks=pytest.mark.xdist_group(case[0]))
        for attention, cases in (("op", CASES), ("gather", GATHERED), ("gridsample", GATHERED))
        for case in cases
    ],
)
def test_graph_matches_official_outputs(exported, name, case, attention):
    golden = Golden(name, case)
    outputs = run_probed(exported(name, attention), golden)
    wanted = golden.outputs
    assert np.abs(outputs["proposal_scores"] - wanted["enc_score"]).max() < SCORE_TOLERANCE
    assert_same_proposals(outputs["topk_indices"], golden)
    same = outputs["topk_indices"] == wanted["topk_idx"]  # a swapped pair has other content in its two slots
    assert same.mean() > 0.99
    assert np.abs(outputs["pred_logits"] - wanted["pred_logits"])[same].max() < LOGIT_TOLERANCE
    assert np.abs(outputs["pred_boxes"] - wanted["pred_boxes"])[same].max() < BOX_TOLERANCE
    assert_same_detections(outputs, wanted)


def assert_same_detections(outputs, wanted) -> None:
    """Detections match on (query, label), not on rank: neighbours in score may swap."""
    num_classes = outputs["pred_logits"].shape[2]
    logits = outputs["pred_logits"].reshape(len(outputs["labels"]), -1)
    for row in range(len(logits)):
        pairs = np.argsort(-logits[row], kind="stable")[: outputs["labels"].shape[1]]
        ours = {(pair // num_classes, pair % num_classes): rank for rank, pair in enumerate(pairs)}
        official = list(zip(wanted["post_query"][row], wanted["post_labels"][row]))
        found = [(ours[pair], rank) for rank, pair in enumerate(official) if pair in ours]
        assert len(found) >= 0.97 * len(official)
        mine, theirs = np.array(found).T
        assert (outputs["labels"][row][mine] == wanted["post_labels"][row][theirs]).mean() > 0.99
        # A logit's tolerance is at most a quarter of it in score; a box's is of the image's longer side.
        assert np.abs(outputs["scores"][row][mine] - wanted["post_scores"][row][theirs]).max() < LOGIT_TOLERANCE / 4
        side = wanted["target_sizes"][row].max()
        assert np.abs(outputs["boxes"][row][mine] - wanted["post_boxes"][row][theirs]).max() < 2 * BOX_TOLERANCE * side


def test_post_processing_alone_matches_the_official_one():
    import torch

    from litedetr_deploy.model.deployed import postprocess

    wanted = Golden("lite_dino_r50_h3l1_2p1x3", "batch2").outputs
    labels, boxes, scores = postprocess(
        torch.from_numpy(wanted["pred_logits"]),
        torch.from_numpy(wanted["pred_boxes"]),
        torch.from_numpy(wanted["target_sizes"][:, ::-1].copy()),
    )
    assert (labels.numpy() == wanted["post_labels"]).all()
    assert np.abs(boxes.numpy() - wanted["post_boxes"]).max() < 1e-3
    assert np.abs(scores.numpy() - wanted["post_scores"]).max() < 1e-6


@pytest.mark.xdist_group("lite_dino_r50_h3l1_2p1x3")
@pytest.mark.parametrize("attention,nodes", [("op", 12), ("gather", 0), ("gridsample", 0)])
def test_graph_has_the_nodes_it_should(exported, attention, nodes):
    model = onnx.load(exported("lite_dino_r50_h3l1_2p1x3", attention))
    kinds = [node.op_type for node in model.graph.node]
    assert sum(node.domain == schema.DOMAIN for node in model.graph.node) == nodes
    assert ("GridSample" in kinds) == (attention == "gridsample")
    assert {o.domain: o.version for o in model.opset_import}[""] == 17
    assert [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", "", "height", "width"]
    assert "Identity" not in kinds and "Dropout" not in kinds and "Constant" not in kinds
    used = {name for node in model.graph.node for name in node.input}
    assert {initializer.name for initializer in model.graph.initializer} <= used
    initializers = {initializer.name: initializer for initializer in model.graph.initializer}
    matrices = [
        node.input[1] for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in initializers
    ]
    unnamed = [name for name in matrices if len(initializers[name].dims) == 2 and not name.startswith("detector.")]
    assert not unnamed, unnamed
