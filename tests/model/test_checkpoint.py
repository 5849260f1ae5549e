"""Recognising and loading checkpoints: every switch that the official code can run, and every way to be wrong."""

import argparse
import itertools
import re

import pytest
import torch

import litedetr_deploy as ld
from litedetr_deploy.model.checkpoints.official import official_key
from litedetr_deploy.model.config import DetectorConfig, parse_variant
from litedetr_deploy.model.detector import Detector

NAME = "lite_dino_r50_h3l1_2p1x3"
SMALL = {"hidden_dim": 64, "num_heads": 2, "dim_feedforward": 64, "decoder_dim_feedforward": 64, "num_queries": 50}


def official_form(config: DetectorConfig) -> dict[str, torch.Tensor]:
    """A state dict of random weights under official keys, without the further aliases of shared heads."""
    return {official_key(key, config): value for key, value in Detector(config).state_dict().items()}


def without(state_dict, *keys):
    return {key: value for key, value in state_dict.items() if key not in keys}


@pytest.mark.parametrize("name,variant", [
    ("lite_dino_r50_h3l1_2p1x3", "lite-dino-r50-h3l1-2+1x3"),
    ("lite_dino_r50_h3l1_6p1x1", "lite-dino-r50-h3l1-6+1x1"),
    ("dino_r50_4scale_full_nokda", "dino-r50"),
])  # fmt: skip
def test_official_state_dicts_load(state_dict_of, name, variant):
    assert ld.load_model(state_dict_of(name), variant).config.name == variant


@pytest.mark.parametrize("expansion,scale,small", list(itertools.product((1, 2, 3, 6), (1, 2, 3), (False, True))))
def test_every_encoder(expansion, scale, small):
    config = DetectorConfig(**SMALL, num_expansion=expansion, enc_scale=scale, small_expand=small, key_aware=True)
    asked = {"enc_scale": scale} | ({} if small else {"num_expansion": expansion})
    model = ld.load_model(official_form(config), **asked)
    assert model.config == config
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 96, 128))["pred_logits"].isfinite().all()


@pytest.mark.parametrize("switches", [
    {"key_aware": True},
    {"key_aware": True, "proj_key": True},
    {"key_aware": True, "same_loc": True},
    {"key_aware": True, "proj_key": True, "same_loc": True},
    {"key_aware": False, "same_loc": True},
    {"key_aware": False},
])  # fmt: skip
def test_every_switch_of_the_attention_is_recognised(switches):
    config = DetectorConfig(**SMALL, num_expansion=3, small_expand=True, **switches)
    model = ld.load_model(official_form(config), enc_scale=3)
    assert model.config == config
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 96, 128))["pred_logits"].isfinite().all()


def test_plain_dino_is_recognised_by_itself():
    config = parse_variant("dino-r101", **SMALL)
    assert ld.load_model(official_form(config)).config == config


@pytest.mark.parametrize("variant,overrides", [
    ("deformable-detr-r50", {}),
    ("lite-deformable-detr-r101-h3l1-6+1x1", {}),
    ("h-detr-r50", {}),
    ("lite-h-detr-r50-h2l2-2+1x3", {}),
    ("lite-dino-swin-t-h3l1-2+1x3", {}),
    ("deformable-detr-swin-t", {"window_size": 4}),
])  # fmt: skip
def test_every_family_and_backbone_is_recognised(variant, overrides):
    config = parse_variant(variant, **SMALL, **overrides)
    asked = {} if config.is_dino else {"num_queries": config.num_queries}
    state_dict = official_form(config)
    model = ld.load_model(state_dict, **asked, **({"enc_scale": config.enc_scale} if config.is_lite else {}))
    assert model.config == config
    prefix = "backbone.0.patch_embed" if variant.startswith("lite-dino-swin") else "backbone.0.body."
    assert any(key.startswith(prefix) for key in state_dict)


def test_number_of_queries_is_published_or_of_the_training(tmp_path):
    # Deformable DETR's state dict does not show it, H-DETR's shows that of both branches.
    state_dict = official_form(parse_variant("h-detr-r50", **SMALL | {"num_queries": 420}))
    assert ld.load_model(state_dict).config.num_queries == 300
    args = argparse.Namespace(num_queries_one2one=400, nheads=2)
    torch.save({"model": state_dict, "args": args}, tmp_path / "checkpoint.pth")
    model = ld.load_model(tmp_path / "checkpoint.pth")
    assert torch.equal(model.tgt_embed.weight, state_dict["query_embed.weight"][:400])


def test_bad_keys_of_other_families_are_named():
    broken = official_form(parse_variant("h-detr-swin-t", **SMALL))
    broken = without(broken, "bbox_embed.6.layers.0.bias", "backbone.0.body.layers.1.blocks.0.attn.qkv.bias")
    broken["class_embed.7.weight"] = torch.zeros(3)
    broken["transformer.decoder.bbox_embed.2.layers.2.bias"] = broken["bbox_embed.2.layers.2.bias"] + 1
    with pytest.raises(ld.LiteDetrError) as error:
        ld.load_model(broken, num_queries=50)
    message = str(error.value)
    assert re.search("missing: [^;]*bbox_embed.6.layers.0.bias", message)
    assert re.search("missing: [^;]*backbone.0.body.layers.1.blocks.0.attn.qkv.bias", message)
    assert "unexpected: class_embed.7.weight" in message
    assert "copies of one head that differ: transformer.decoder.bbox_embed.2.layers.2.bias" in message


@pytest.mark.parametrize("box_refine", [True, False])
def test_one_stage_models_are_recognised(box_refine):
    config = parse_variant("one-stage-deformable-detr-r26n", num_queries=20, box_refine=box_refine)
    state_dict = official_form(config)
    assert {"query_embed.weight", "transformer.reference_points.weight"} < state_dict.keys()
    assert ld.load_model(state_dict).config == config
    with pytest.raises(ld.LiteDetrError, match="missing: transformer.reference_points.bias"):
        ld.load_model(without(state_dict, "transformer.reference_points.bias"))


def test_only_one_stage_models_can_be_without_box_refinement():
    with pytest.raises(ld.LiteDetrError, match="box_refine is False; it must be True in dino"):
        DetectorConfig(box_refine=False)


def test_the_wrong_family_is_named():
    with pytest.raises(ld.LiteDetrError, match="family is deformable-detr by the weights, h-detr by the variant"):
        ld.load_model(official_form(parse_variant("deformable-detr-r50", **SMALL)), "h-detr-r50")


def test_unknown_swin_is_named():
    state_dict = official_form(parse_variant("dino-swin-t", **SMALL))
    for key in [key for key in state_dict if "patch_embed" in key]:
        state_dict[key] = torch.zeros(128, *state_dict[key].shape[1:])
    with pytest.raises(ld.LiteDetrError, match="Swin has 128 channels, 6 blocks.*swin-t: 96 and 6"):
        ld.load_model(state_dict)


@pytest.mark.parametrize("file,scale", [("r50_s3ex3_50.4.pth", 3), ("r50_s2ex3_49.9.pth", 2)])
def test_official_file_names_say_the_scale(state_dict_of, tmp_path, file, scale):
    torch.save({"model": state_dict_of(NAME)}, tmp_path / file)
    assert ld.load_model(tmp_path / file).config.enc_scale == scale


def test_training_arguments_say_the_scale(tmp_path):
    config = DetectorConfig(**SMALL, num_expansion=3, small_expand=True, key_aware=True, enc_scale=2)
    args = argparse.Namespace(enc_scale=2, num_expansion=3, nheads=2)
    torch.save({"model": official_form(config), "args": args}, tmp_path / "checkpoint.pth")
    assert ld.load_model(tmp_path / "checkpoint.pth").config == config


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    config = DetectorConfig(**SMALL, num_expansion=3, small_expand=True, key_aware=True)
    save_file({k: v.contiguous() for k, v in official_form(config).items()}, tmp_path / "weights.safetensors")
    assert ld.load_model(tmp_path / "weights.safetensors", enc_scale=3).config == config


def test_a_lite_model_without_its_scale_asks_for_it(state_dict_of):
    with pytest.raises(ld.LiteDetrError, match="cannot tell how many of its levels are high-level.*--variant"):
        ld.load_model(state_dict_of(NAME))


def test_a_model_without_light_networks_asks_which_it_is(state_dict_of):
    with pytest.raises(ld.LiteDetrError, match="full-scale or interleaved.*--variant"):
        ld.load_model(state_dict_of("dino_r50_4scale_full_nokda"))


@pytest.mark.parametrize("variant,says", [
    ("dino-r50", "linear12) is True by the weights, False by the variant 'dino-r50'"),
    ("lite-dino-r50-h3l1-6+1x1", "is 3 by the weights, 1 by the variant 'lite-dino-r50-h3l1-6+1x1'"),
    ("lite-dino-r101-h3l1-2+1x3", "backbone is r50 by the weights, r101 by the variant"),
    ("lite-dino-r50-h4l0-2+1x3", "share out the 4 levels"),
    ("lite-dino-r50-h3l1-2+1x2", "must multiply to 6"),
    ("rt-detr-r50", "unknown variant"),
])  # fmt: skip
def test_the_wrong_variant_is_named(state_dict_of, variant, says):
    with pytest.raises(ld.LiteDetrError, match=re.escape(says)):
        ld.load_model(state_dict_of(NAME), variant)


def test_every_bad_key_is_named(state_dict_of):
    broken = without(state_dict_of(NAME), "transformer.decoder.norm.bias", "backbone.0.body.layer1.0.bn1.running_var")
    broken["extra.weight"] = torch.zeros(3)
    broken["transformer.enc_output.bias"] = torch.zeros(7)
    with pytest.raises(ld.LiteDetrError) as error:
        ld.load_model(broken, "lite-dino-r50-h3l1-2+1x3")
    message = str(error.value)
    assert re.search(r"missing: [^;]*backbone.0.body.layer1.0.bn1.running_var", message)
    assert re.search(r"missing: [^;]*transformer.decoder.norm.bias", message)
    assert "unexpected: extra.weight" in message
    assert "transformer.enc_output.bias is [7], must be [256]" in message


def test_heads_that_are_not_shared_are_refused(state_dict_of):
    changed = dict(state_dict_of(NAME))
    changed["class_embed.2.bias"] = changed["class_embed.2.bias"] + 1
    with pytest.raises(ld.LiteDetrError, match="differ between layers.*class_embed.2.bias"):
        ld.load_model(changed, "lite-dino-r50-h3l1-2+1x3")


def test_value_proj_after_is_refused_by_name(tmp_path, state_dict_of):
    torch.save({"model": state_dict_of(NAME), "args": argparse.Namespace(value_proj_after=True)}, tmp_path / "s3.pth")
    with pytest.raises(ld.LiteDetrError, match="value_proj_after"):
        ld.load_model(tmp_path / "s3.pth")


def test_another_architecture_is_refused(tmp_path):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}}, tmp_path / "resnet.pth")
    with pytest.raises(ld.LiteDetrError, match="another architecture.*conv1.weight"):
        ld.load_model(tmp_path / "resnet.pth")


@pytest.mark.parametrize("spoil", ["text", "truncated", "empty", "objects", "tensor", "folder"])
def test_files_that_are_no_checkpoint(tmp_path, spoil):
    path = tmp_path / "weights.pth"
    if spoil == "text":
        path.write_text("epoch 12: AP 50.4\n")
    elif spoil == "empty":
        path.touch()
    elif spoil == "truncated":
        torch.save({"model": {"weight": torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:-600])
    elif spoil == "objects":
        torch.save({"model": {"weight": torch.zeros(3)}, "config": Unknown()}, path)
    elif spoil == "tensor":
        torch.save(torch.zeros(3), path)
    else:
        path.mkdir()
    with pytest.raises(ld.LiteDetrError, match=re.escape(str(path))):
        ld.load_model(path)


class Unknown:
    """Something that a checkpoint must not be able to bring in."""


@pytest.mark.parametrize("spelling", ["lite-dino-r50-h3l1-2+1x3", "Lite-DINO-R50-H3L1-(2+1)x3", "lite-dino-r50"])
def test_spellings_of_a_variant(spelling):
    assert parse_variant(spelling).name == "lite-dino-r50-h3l1-2+1x3"


@pytest.mark.parametrize("spelling,name", [
    ("Lite-Deformable-DETR R50 H3L1-(3+1)x2", "lite-deformable-detr-r50-h3l1-3+1x2"),
    ("Lite-H-DETR Swin-T H2L2-(2+1)x3", "lite-h-detr-swin-t-h2l2-2+1x3"),
    ("H-DETR Swin-L", "h-detr-swin-l"),
    ("Deformable DETR R101", "deformable-detr-r101"),
])  # fmt: skip
def test_spellings_of_the_paper(spelling, name):
    assert parse_variant(spelling).name == name
    assert parse_variant(name) == parse_variant(spelling)


@pytest.mark.parametrize("variant,layers", [
    ("lite-dino-r50-h3l1-6+1x1", "HHHHHF"),
    ("lite-dino-r50-h3l1-3+1x2", "HHFHHF"),
    ("lite-dino-r50-h3l1-2+1x3", "HFHFHF"),
    ("dino-r50", "FFFFFF"),
])  # fmt: skip
def test_encoder_schedules(variant, layers):
    assert "".join("HF"[full] for full in parse_variant(variant).full_layers) == layers
