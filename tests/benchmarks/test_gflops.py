"""Counts of operations against hand-computed ones and the official code's (tests/golden/flops.json)."""

import json

import pytest
import torch
from typer.testing import CliRunner

import litedetr_deploy as ld
from litedetr_deploy import cli
from litedetr_deploy.model.config import parse_variant
from litedetr_deploy.model.detector import Detector
from litedetr_deploy.model.flops import BILINEAR, NORM, SOFTMAX, attention_cost, count_flops
from litedetr_deploy.model.onnx_flops import count_onnx_flops
from litedetr_deploy.model.paper import PUBLISHED

from ..conftest import GOLDEN

OFFICIAL = json.loads((GOLDEN / "flops.json").read_text())
CASES = {
    "lite_dino_r50_h3l1_6p1x1": ("lite-dino-r50-h3l1-6+1x1", {}),
    "lite_dino_r50_h3l1_2p1x3": ("lite-dino-r50-h3l1-2+1x3", {}),
    "lite_dino_r50_h2l2_2p1x3": ("lite-dino-r50-h2l2-2+1x3", {}),
    "lite_dino_r50_h3l1_2p1x3_nokda": ("lite-dino-r50-h3l1-2+1x3", {"key_aware": False}),
    "dino_r50_4scale_full_nokda": ("dino-r50", {}),
    "dino_r50_4scale_full_kda": ("dino-r50", {"key_aware": True}),
    "h3l1_2p1x3_projkey": ("lite-dino-r50-h3l1-2+1x3", {"proj_key": True}),
    "h3l1_2p1x3_sameloc": ("lite-dino-r50-h3l1-2+1x3", {"same_loc": True}),
    "h3l1_2p1x3_nosmallexpand": ("lite-dino-r50-h3l1-2+1x3", {"small_expand": False}),
}
# The official parts, and how ours begin.
PARTS = {
    "backbone": ("backbone",),
    "input_proj": ("projections",),
    "encoder": ("encoder",),
    "two_stage": ("query selection",),
    "decoder": ("decoder", "heads"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", ["850x1040", "640x640"])
def test_official_counts(name, size):
    variant, overrides = CASES[name]
    count = count_flops(parse_variant(variant, **overrides), tuple(map(int, size.split("x"))))
    official = OFFICIAL[name][size]
    rounding = 0.0051  # of the file's figures
    assert count.total("fvcore") / 1e9 == pytest.approx(official["total"], abs=rounding)
    for part, beginnings in PARTS.items():
        ours = sum(c["fvcore"] for p, c in count.parts().items() if p.startswith(beginnings))
        assert ours / 1e9 == pytest.approx(official[part], abs=rounding), part


def test_small_case_by_hand():
    """One level-1-and-up 'H' layer and one 'F' layer of 64 channels; an image of 128x192 has 16x24 + 8x12 + 4x6 + 2x3
    tokens."""
    config = parse_variant(
        "lite-dino-r50", hidden_dim=64, num_heads=2, dim_feedforward=96, decoder_dim_feedforward=32, num_queries=10,
        num_classes=7, encoder_layers=2, num_expansion=1, decoder_layers=1,
    )  # fmt: skip
    count = count_flops(config, (128, 192))
    parts = count.parts()
    low, high, dim, samples = 384, 96 + 24 + 6, 64, 16 * 2
    both = low + high

    def attention(queries):  # value of all tokens; offsets, query and output projections of the queries
        return both * dim * dim + queries * (samples * 2 + dim + dim) * dim + queries * 16 * dim * 10

    def norms(*numbers):
        return NORM * dim * sum(numbers)

    assert parts["encoder layer 1 (H)"]["fvcore"] == attention(high) + 2 * high * dim * 96 + norms(high, high)
    light = 2 * low * dim * dim
    assert parts["encoder layer 2 (F)"]["fvcore"] == attention(both) + 2 * high * dim * 96 + light + norms(both, both)
    assert parts["projections"]["fvcore"] == (
        dim * (low * 512 + 96 * 1024 + 24 * 2048 + 6 * 2048 * 9) + NORM * dim * both
    )
    box = 2 * dim * dim + 4 * dim
    assert parts["query selection"]["fvcore"] == both * dim * dim + norms(both) + both * dim * 7 + 10 * box
    assert parts["heads"]["fvcore"] == 10 * (dim * 7 + box)
    assert parts["query selection, for training"]["fvcore"] == 10 * dim * 7
    assert "heads, for training" not in parts  # of one layer, all are read
    self_attention = 10 * 4 * dim * dim + 2 * 10 * 10 * dim
    position = 10 * (2 * dim * dim + dim * dim)
    assert parts["decoder"]["fvcore"] == (
        self_attention + attention(10) + position + 2 * 10 * dim * 32 + norms(10, 10, 10, 10)
    )
    # Everything counted: one gather instead of two, and the softmax.
    assert sum(c.all for c in count.costs if c.module == "encoder.layers.0.self_attn" and "attention" in c.kind) == (
        high * 16 * (dim * 6 + 2 * SOFTMAX)
    )
    assert parts["encoder, residual sums"]["all"] > 0 == parts["encoder, residual sums"]["fvcore"]
    with torch.device("meta"):
        wanted = sum(p.numel() for p in Detector(config).parameters())
    assert sum(count.parameters.values()) == wanted == sum(part["parameters"] for part in parts.values())


@pytest.mark.parametrize("op,has_key,wanted", [
    ("MSDeformAttn", False, (BILINEAR * 32, (BILINEAR + 1) * 32 + SOFTMAX)),
    ("KeyAwareDeformAttn", False, ((2 * BILINEAR + 2) * 32, (BILINEAR + 2) * 32 + SOFTMAX)),
    ("KeyAwareDeformAttn", True, ((2 * BILINEAR + 2) * 32, (2 * BILINEAR + 2) * 32 + SOFTMAX)),
])  # fmt: skip
def test_attention_of_one_sample(op, has_key, wanted):
    assert attention_cost(op, 1, 32, has_key) == wanted


def test_swin_backbone_by_hand():
    """Stages of 56x56 to 7x7 tokens are whole windows: Swin-T's 4.5 GFLOPs at 224x224 (its table 1) less the head."""
    config = parse_variant("dino-swin-t", hidden_dim=64, num_heads=2, num_queries=10)
    backbone = count_flops(config, (224, 224)).parts()["backbone"]
    products = 56 * 56 * 96 * 48
    for stage, blocks in enumerate((2, 2, 6, 2)):
        tokens, dim = (56 >> stage) ** 2, 96 << stage
        products += blocks * tokens * (12 * dim * dim + 2 * 49 * dim)
        products += tokens // 4 * 8 * dim * dim if stage < 3 else 0
    assert products == pytest.approx(4.5e9, rel=0.03)
    norms = 56 * 56 * 96 * NORM
    for stage, blocks in enumerate((2, 2, 6, 2)):
        numbers = (56 >> stage) ** 2 * (96 << stage)
        norms += NORM * numbers * (2 * blocks + (stage < 3) + (stage > 0))
    assert backbone["fvcore"] == products + norms
    assert backbone["parameters"] == pytest.approx(27.5e6, rel=0.01)


@pytest.mark.parametrize("row", [row for row in PUBLISHED if row.variant in ("deformable-detr-r50", "h-detr-swin-t")])
def test_paper_rows(row):
    assert count_flops(parse_variant(row.variant)).total("fvcore") / 1e9 == pytest.approx(row.gflops, rel=0.05)


def test_paper_rows_parse():
    assert [parse_variant(row.variant).name for row in PUBLISHED] == [row.variant for row in PUBLISHED]
    assert len(PUBLISHED) == 19


@pytest.mark.slow
def test_exported_model(tmp_path):
    model = ld.load_model(variant="lite-dino-r26n")
    ld.export_onnx(model, tmp_path / "model.onnx", image_size=(192, 256), verify=False)
    exported, traced = count_onnx_flops(tmp_path / "model.onnx").parts(), count_flops(model.config, (192, 256)).parts()
    for part, count in traced.items():
        if "training" in part or part == "positions and boxes":
            continue
        # What the export computes from constants, such as the first self-attention's query content, is gone.
        assert exported[part]["fvcore"] == pytest.approx(count["fvcore"], rel=0.01), part
        assert exported[part]["parameters"] == pytest.approx(count["parameters"], rel=0.2), part
        if part == "backbone" or part.startswith("encoder"):
            assert exported[part]["fvcore"] == count["fvcore"], part
            assert exported[part]["parameters"] == count["parameters"], part
    with pytest.raises(ld.LiteDetrError, match="takes images of 192x256"):
        count_onnx_flops(tmp_path / "model.onnx", (256, 256))


def test_command():
    result = CliRunner().invoke(cli.app, ["benchmark", "gflops", "lite-dino-r26n", "--image-size", "128x192", "--json"])
    assert result.exit_code == 0, result.stderr
    count = json.loads(result.stdout)
    assert count["total"]["fvcore"] == count_flops(parse_variant("lite-dino-r26n"), (128, 192)).total("fvcore")
    result = CliRunner().invoke(cli.app, ["benchmark", "gflops", "lite-dino-r26n", "--image-sizes", "128x192"])
    assert "encoder layer 2 (F)" in result.stdout and "query selection" in result.stdout
    result = CliRunner().invoke(cli.app, ["benchmark", "gflops", "nothing-r50"])
    assert result.exit_code == 2 and "unknown variant" in result.stderr
