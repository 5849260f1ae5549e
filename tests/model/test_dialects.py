"""Key names of MMDetection and detrex.

Neither package installs here, so nothing of theirs is run.  What is checked: the names of their parameters, written out
below from their model definitions (MMDetection 3.x: detectors/dino.py and deformable_detr.py, layers/transformer/
{deformable_detr,dino}_layers.py, backbones/{resnet,swin}.py, necks/channel_mapper.py, dense_heads/
deformable_detr_head.py, and mmcv's FFN and attentions; detrex: projects/dino and projects/deformable_detr,
layers/transformer.py, modeling/neck/channel_mapper.py, detectron2's ResNet), are those that the tables give for our
parameters; state dicts under these names load to the same weights; and the order of a patch merging's channels, on
torch's own unfold, which MMDetection calls.  That the outputs equal theirs is not.
"""

import dataclasses

import pytest
import torch

import litedetr_deploy as ld
from litedetr_deploy.model.checkpoints import detrex, mmdetection
from litedetr_deploy.model.checkpoints.official import theirs
from litedetr_deploy.model.config import parse_variant
from litedetr_deploy.model.detector import Detector

MODULES = {"mmdetection": mmdetection, "detrex": detrex}
FAMILIES = ("dino-r26n", "deformable-detr-r26n", "one-stage-deformable-detr-r26n")


def both(*names: str) -> list[str]:
    return [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")]


def norm(name: str) -> list[str]:
    return [*both(name), f"{name}.running_mean", f"{name}.running_var"]


def their_names(source: str, config) -> set[str]:
    """The names of the parameters that inference reads, by the definitions."""
    mm = source == "mmdetection"
    inside, attention, ffn = ("", "self_attn", "ffn") if mm else ("transformer.", "attentions.0", "ffns.0")
    cross = "cross_attn" if mm else "attentions.1"
    sampling = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    names = [f"{inside}level_embed{'' if mm else 's'}"]
    for layer in range(config.encoder_layers):
        at = f"{inside}encoder.layers.{layer}."
        names += both(*(f"{at}{attention}.{part}" for part in sampling), f"{at}{ffn}.layers.0.0", f"{at}{ffn}.layers.1")
        names += both(f"{at}norms.0", f"{at}norms.1")
    for layer in range(config.decoder_layers):
        at = f"{inside}decoder.layers.{layer}."
        names += both(*(f"{at}{cross}.{part}" for part in sampling), f"{at}{ffn}.layers.0.0", f"{at}{ffn}.layers.1")
        names += both(*(f"{at}norms.{i}" for i in range(3)), f"{at}{attention}.attn.out_proj")
        names += [f"{at}{attention}.attn.in_proj_{leaf}" for leaf in ("weight", "bias")]
    # The last layer's classes, every layer's box, unless all have one, and those of the proposals.
    layers = config.decoder_layers
    proposals = [] if config.is_one_stage else [layers]
    for head in (layers - 1, *proposals):
        names += both(f"bbox_head.cls_branches.{head}" if mm else f"class_embed.{head}")
    for head in (*range(layers), *proposals):
        for i in range(3):
            names += both(f"bbox_head.reg_branches.{head}.{2 * i}" if mm else f"bbox_embed.{head}.layers.{i}")
    if config.is_one_stage:
        names += ["query_embedding.weight", *both("reference_points_fc" if mm else "transformer.reference_points")]
    else:
        names += both(*(("memory_trans_fc", "memory_trans_norm") if mm else
                        ("transformer.enc_output", "transformer.enc_output_norm")))  # fmt: skip
    if config.is_dino:
        names += ["query_embedding.weight" if mm else "transformer.tgt_embed.weight"]
        names += both(f"{inside}decoder.norm", *(f"{inside}decoder.ref_point_head.layers.{i}" for i in (0, 1)))
    elif not config.is_one_stage:
        names += both(*(("pos_trans_fc", "pos_trans_norm") if mm else
                        ("transformer.pos_trans", "transformer.pos_trans_norm")))  # fmt: skip
    for conv in ("convs.0", "convs.1", "convs.2", "extra_convs.0"):
        names += both(f"neck.{conv}.conv", f"neck.{conv}.{'gn' if mm else 'norm'}")
    names += ["backbone.conv1.weight", *norm("backbone.bn1")] if mm else [
        "backbone.stem.conv1.weight", *norm("backbone.stem.conv1.norm")]  # fmt: skip
    for stage in range(4):
        for block in range(2):
            at = f"backbone.layer{stage + 1}.{block}." if mm else f"backbone.res{stage + 2}.{block}."
            for i in (1, 2, 3):
                names += [f"{at}conv{i}.weight", *norm(f"{at}bn{i}" if mm else f"{at}conv{i}.norm")]
            if block == 0:
                short = ("downsample.0", "downsample.1") if mm else ("shortcut", "shortcut.norm")
                names += [f"{at}{short[0]}.weight", *norm(at + short[1])]
    return set(names)


@pytest.fixture(scope="module", params=[(source, family) for source in MODULES for family in FAMILIES],
                ids=lambda pair: "-".join(pair))  # fmt: skip
def case(request):
    source, family = request.param
    size = {"hidden_dim": 32, "num_heads": 1, "dim_feedforward": 32, "decoder_dim_feedforward": 32, "num_classes": 80}
    config = parse_variant(family, **size, encoder_layers=2, num_expansion=2, decoder_layers=2, num_queries=20,
                           implementation=source)  # fmt: skip
    torch.manual_seed(3)
    model = Detector(config)
    names = their_names(source, config)
    rules = MODULES[source].rules_of(names, False)
    return source, config, model, names, {theirs(key, rules): value for key, value in model.state_dict().items()}


def test_their_names_are_those_of_the_definitions(case):
    _, _, model, names, state_dict = case
    assert state_dict.keys() == names and len(names) == len(model.state_dict())


def test_their_state_dict_loads(case, tmp_path):
    source, config, model, _, state_dict = case
    names = ld.load_model("lite-dino-shapes").class_names  # of another data set
    contents = {"model": state_dict}
    if source == "mmdetection":
        unread = {"dn_query_generator.label_embedding.weight": torch.zeros(80, 32), "bbox_head.cls_branches.0.bias":
                  torch.ones(80), "backbone.bn1.num_batches_tracked": torch.zeros((), dtype=torch.long)}  # fmt: skip
        contents = {"state_dict": state_dict | unread, "meta": {"dataset_meta": {"classes": (*names, *"x" * 70)}}}
    torch.save(contents, tmp_path / "weights.pth")
    loaded = ld.load_model(tmp_path / "weights.pth", num_queries=20)
    assert loaded.config == config
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    assert loaded.class_names[:2] == (names[:2] if source == "mmdetection" else ("person", "bicycle"))
    with torch.inference_mode():
        assert loaded(torch.zeros(1, 3, 128, 64))["pred_boxes"].shape == (1, 20, 4)
    ld.save_checkpoint(loaded, tmp_path / "official.pth")  # whose arguments say whose details hold
    again = ld.load_model(tmp_path / "official.pth", num_queries=20)
    assert again.config == config
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())


def test_missing_and_misshapen_keys_are_named(case):
    _, _, _, _, state_dict = case
    key = next(key for key in state_dict if key.endswith("norms.0.weight"))
    with pytest.raises(ld.LiteDetrError, match=f"missing: {key}. "):
        ld.load_model({k: v for k, v in state_dict.items() if k != key}, num_queries=20)
    with pytest.raises(ld.LiteDetrError, match=rf"misshapen: {key} is \[3\], must be \[32\]"):
        ld.load_model(state_dict | {key: torch.zeros(3)}, num_queries=20)


def test_convolutions_of_a_neck_may_have_no_bias(case):
    source, _, _, _, state_dict = case
    if source == "mmdetection":
        without = {k: v for k, v in state_dict.items() if not (k.startswith("neck.") and k.endswith("conv.bias"))}
        assert not ld.load_model(without, num_queries=20).input_proj[3][0].bias.any()


def test_box_heads_that_all_layers_share(case):
    """MMDetection and detrex write a shared head once for every layer."""
    _, config, _, _, state_dict = case
    if config.is_one_stage:
        shared = {
            key: state_dict[key.replace("branches.1", "branches.0").replace("bbox_embed.1", "bbox_embed.0")]
            if "reg_branches" in key or "bbox_embed" in key else value for key, value in state_dict.items()
        }  # fmt: skip
        assert ld.load_model(shared, num_queries=20).config == dataclasses.replace(config, box_refine=False)


def test_what_is_not_supported_is_refused_by_name(case):
    source, _, _, _, state_dict = case
    with pytest.raises(ld.LiteDetrError, match="five-scale"):
        ld.load_model(state_dict | {"neck.convs.3.conv.weight": torch.zeros(32, 768, 1, 1)})
    if source == "mmdetection":
        with pytest.raises(ld.LiteDetrError, match="MMDetection 2"):
            ld.load_model(state_dict | {"bbox_head.transformer.level_embeds": torch.zeros(4, 32)})


def test_names_of_mmdetections_swin():
    keys = {
        f"backbone.layers.0.blocks.1.{name}"
        for name in (
            "norm1.weight",
            "attn.qkv.bias",
            "attn.relative_position_bias_table",
            "mlp.fc1.weight",
            "mlp.fc2.bias",
        )
    }
    keys |= {"backbone.patch_embed.proj.weight", "backbone.patch_embed.norm.bias", "backbone.norm3.weight",
             "backbone.layers.1.downsample.reduction.weight"}  # fmt: skip
    block = "backbone.stages.0.blocks.1."
    assert {theirs(key, mmdetection.rules_of(())) for key in keys} == {
        f"{block}norm1.weight", f"{block}attn.w_msa.qkv.bias", f"{block}attn.w_msa.relative_position_bias_table",
        f"{block}ffn.layers.0.0.weight", f"{block}ffn.layers.1.bias", "backbone.patch_embed.projection.weight",
        "backbone.patch_embed.norm.bias", "backbone.norm3.weight", "backbone.stages.1.downsample.reduction.weight",
    }  # fmt: skip


def test_the_order_of_merged_patches():
    """MMDetection's PatchMerging is torch.nn.Unfold(2, stride=2), norm, Linear; the official one concatenates."""
    torch.manual_seed(2)
    x, weight = torch.randn(1, 5, 4, 6, dtype=torch.float64), torch.randn(7, 20, dtype=torch.float64)
    unfolded = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2) @ weight.T
    parts = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
    concatenated = torch.cat(parts, 1).flatten(2).transpose(1, 2) @ mmdetection.merged_as_official(weight).T
    torch.testing.assert_close(concatenated, unfolded, rtol=1e-12, atol=1e-12)
