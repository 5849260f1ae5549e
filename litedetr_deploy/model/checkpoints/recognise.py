"""What a checkpoint is: from its weights, and from the variant, the training arguments and the official file's name,
which say what keys and shapes cannot tell (high-level levels, interleaving, heads).  All of it has to agree."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping

from ...errors import LiteDetrError
from ..config import DetectorConfig, parse_variant
from ..resnet import SHAPES as RESNETS
from ..swin import SHAPES as SWINS
from .official import Weights, some, theirs

# r50_s3ex1_50.2.pth, checkpoint_s2ex3.pth, lite_dino_s3_r50.pth: s = high-level scales, ex = expansions.
_FILE_NAME = re.compile(r"(?:^|[_\-.])s(?P<enc_scale>[123])(?:ex(?P<num_expansion>[1236]))?(?=[_\-.]|$)")
# Training arguments, as the official code names them (the last is H-DETR's) -> our fields.
_ARGUMENTS = {
    "enc_scale": "enc_scale", "num_expansion": "num_expansion", "nheads": "num_heads", "hidden_dim": "hidden_dim",
    "enc_layers": "encoder_layers", "dec_layers": "decoder_layers", "num_feature_levels": "num_levels",
    "num_queries": "num_queries", "num_queries_one2one": "num_queries",
}  # fmt: skip
_MEANINGS = {
    "enc_scale": " (how many levels are high-level)",
    "num_expansion": " (how many encoder layers update all levels)",
    "small_expand": " (whether it has the light feed-forward networks of a Lite model, linear12)",
}
_WEIGHTS = "the weights"


def recognise(
    weights: Weights, variant: str | None, arguments: Mapping, file_name: str, force: bool, overrides: dict
) -> tuple[DetectorConfig, str | None]:
    """Return the configuration, and the contradiction that `force` overruled, None where there was none.

    arguments: those of the training, by their official names; of contradictory ones the variant, then they, then the
    file's name count.  overrides: fields of the configuration that are what they are, whatever is said.
    """
    told = _by_weights(weights)
    offsets = {part: told.pop(f"{part}_offsets") for part in ("encoder", "decoder")}
    by_name = match.groupdict() if (match := _FILE_NAME.search(file_name)) else {}
    said = {
        _WEIGHTS: told,
        f"the variant {variant!r}": _by_variant(variant),
        "the checkpoint's training arguments": _by_arguments(arguments, overrides),
        f"the file's name {file_name!r}": {field: int(value) for field, value in by_name.items() if value},
    }
    plain = not (told["key_aware"] or told["small_expand"] or weights.having("encoder.*.query_proj.*"))
    if plain and "num_expansion" not in arguments:
        # Lite-DETR's module always has a query projection; this is the original one, which is full-scale.
        said["the weights, whose attention is the original one"] = {"num_expansion": told["encoder_layers"]}
    fields = {field: value for claims in reversed(said.values()) for field, value in claims.items()} | overrides

    base = f"{fields['family']}-{fields['backbone']}"
    if "num_expansion" not in fields:
        raise LiteDetrError(
            "the checkpoint cannot tell whether its encoder is full-scale or interleaved (it has no light "
            f"feed-forward networks). Say which with --variant (variant=): {base}, or a Lite one such as "
            f"lite-{base}-h3l1-2+1x3."
        )
    is_lite = fields["small_expand"] or fields["num_expansion"] != fields["encoder_layers"]
    if not is_lite:  # nothing reads it
        fields["enc_scale"] = overrides.get("enc_scale", fields["num_levels"] - 1)
    disputed, certain = [], False
    for field in sorted(fields.keys() - overrides.keys()):
        by = {who: claims[field] for who, claims in said.items() if field in claims}
        if len(set(by.values())) > 1 and (is_lite or field != "enc_scale"):
            values = ", ".join(f"{value} by {who}" for who, value in by.items())
            disputed.append(f"{field}{_MEANINGS.get(field, '')} is {values}")
            certain |= _WEIGHTS in by
    contradiction = "; ".join(disputed)
    if certain:
        raise LiteDetrError(
            f"the checkpoint is not what is said of it: {contradiction}. Leave the variant out or give the one that it "
            f"was trained as ({_variants(told)}), and correct arguments or a name that are wrong."
        )
    if contradiction and not force:
        raise LiteDetrError(
            f"what is said of the checkpoint is contradictory: {contradiction}. Correct what is wrong, or leave it "
            "out. Where you know better, --force-variant (force_variant=True) goes on with what is named first, and "
            "the exported file says so."
        )
    if "enc_scale" not in fields:
        raise LiteDetrError(
            "the checkpoint is a Lite model, and cannot tell how many of its levels are high-level (enc_scale). "
            f"Say which with --variant (variant=): {_variants(fields)} (H3L1 or H2L2). The official file names say "
            "it as well: s3 or s2, as in r50_s3ex3_50.4.pth."
        )
    # Every published model has heads of 32 channels; the number of heads shows in no shape.
    fields = {"num_heads": max(1, told["hidden_dim"] // 32), "num_queries": parse_variant(base).num_queries} | fields
    heads = fields["num_heads"]
    for part, width in offsets.items():
        levels = 1 if part == "encoder" and fields["same_loc"] else fields["num_levels"]
        if isinstance(heads, int) and heads > 0:  # else DetectorConfig says so
            fields.setdefault(f"{part}_points", max(1, width // (2 * heads * max(1, levels))))
    try:
        return DetectorConfig(**fields), contradiction or None
    except LiteDetrError as error:
        raise LiteDetrError(f"what the checkpoint and its training arguments say fits no detector: {error}") from error


def _variants(fields: Mapping) -> str:
    """The names that a checkpoint with these fields can have."""
    base, expansions = f"{fields['family']}-{fields['backbone']}", fields.get("num_expansion")
    if not expansions or expansions >= fields["encoder_layers"] and not fields["small_expand"]:
        return base if expansions else f"{base} or lite-{base}-h3l1-2+1x3"
    layers = f"{fields['encoder_layers'] // expansions}+1x{expansions}"
    return f"lite-{base}-h3l1-{layers} or lite-{base}-h2l2-{layers}"


def _by_variant(variant: str | None) -> dict:
    if variant is None:
        return {}
    named = parse_variant(variant)
    said = {"family": named.family, "backbone": named.backbone, "num_expansion": named.num_expansion}
    return said | ({"enc_scale": named.enc_scale} if named.is_lite else {"small_expand": False})


def _by_arguments(arguments: Mapping, overrides: Mapping) -> dict:
    said = {}
    for name, field in _ARGUMENTS.items():
        value = arguments.get(name)
        if value is None or field in overrides:
            continue
        if type(value) is not int or value < 1:
            raise LiteDetrError(
                f"the checkpoint's training arguments say {name} = {reprlib.repr(value)}; it must be a whole number "
                "from 1. Correct it in the checkpoint's 'args', and save it again."
            )
        said[field] = value
    if "implementation" not in overrides and "implementation" in arguments:
        said["implementation"] = arguments["implementation"]
    return said


def _by_weights(weights: Weights) -> dict:
    """Return what keys and shapes tell, and the widths of all offsets of an encoder's and a decoder's layer."""
    one_stage = bool(weights.having("reference_points.*"))
    modules = {
        "num_classes": "*class_embed.*", "hidden_dim": "encoder.layers.*.norm1.*" if one_stage else "enc_output*",
        "encoder_offsets": "encoder.layers.*.self_attn.sampling_offsets.*",
        "decoder_offsets": "decoder.layers.*.cross_attn.sampling_offsets.*",
        "dim_feedforward": "encoder.layers.*.linear1.*", "decoder_dim_feedforward": "decoder.layers.*.linear1.*",
    }  # fmt: skip
    lacking = [theirs(module, weights.rules) for module in modules.values() if not weights.having(module)]
    backbone = _backbone(weights)
    if lacking or not backbone:
        raise LiteDetrError(
            "the checkpoint is of another architecture than (Lite-)DINO, Deformable DETR or H-DETR with a "
            f"ResNet or Swin backbone: it lacks {some(lacking or ['a backbone'])}. Its keys begin with "
            f"{some(weights.names.values())}."
        )
    family = "dino"
    if weights.having("pos_trans*"):
        family = "h-detr" if "tgt_embed.weight" in weights.tensors else "deformable-detr"
    if one_stage:
        family = "one-stage-deformable-detr"
    layers = weights.count("encoder.layers.")
    fields = {
        "family": family,
        **backbone,
        **{field: weights.size(module) for field, module in modules.items()},
        "num_levels": weights.count("input_proj."),
        "encoder_layers": layers,
        "decoder_layers": weights.count("decoder.layers."),
        "key_aware": not weights.having("encoder.*.attention_weights.*"),
        "proj_key": bool(weights.having("encoder.*.key_proj.*")),
    }
    # Encoder and decoder have as many points; offsets shared by all levels are narrower by their number.
    fields["same_loc"] = fields["encoder_offsets"] * fields["num_levels"] == fields["decoder_offsets"]
    if one_stage:
        fields["box_refine"] = bool(weights.having("bbox_embed.[0-9]*"))
    # Under the official keys H-DETR's queries are those of both branches.
    queries = weights.size("query_embed.weight" if one_stage else "tgt_embed.weight")
    if queries and weights.names.get("tgt_embed.weight") != "query_embed.weight":
        fields["num_queries"] = queries
    light = [i for i in range(layers) if weights.having(f"encoder.layers.{i}.*[12]2.*")]  # linear12, linear22, norm22
    fields["small_expand"] = bool(light)
    if light:
        every = layers // len(light)
        if light != list(range(every - 1, layers, every)):
            raise LiteDetrError(
                f"the checkpoint has light feed-forward networks (linear12) in encoder layers {light} of {layers}; an "
                "interleaved encoder has them at equal distances, up to the last layer."
            )
        fields["num_expansion"] = len(light)
    return fields


def _backbone(weights: Weights) -> dict:
    """Return the fields of the backbone, none where it is neither ResNet nor Swin."""
    if weights.having("backbone.layer3.*.conv3.*"):
        found: tuple[int, ...] = (weights.count("backbone.layer3."),)
        known: dict[str, tuple[int, ...]] = {name: stages[2:3] for name, (_, stages) in RESNETS.items()}
        what = "ResNet has {} blocks in its third stage"
    elif weights.having("backbone.patch_embed.*"):
        found = (weights.size("backbone.patch_embed.*"), weights.count("backbone.layers.2.blocks."))
        known = {name: (dim, stages[2]) for name, (dim, stages, _) in SWINS.items()}
        what = "Swin has {} channels, {} blocks in its third stage"
    else:
        return {}
    name = next((name for name, shape in known.items() if shape == found), None)
    if name is None:
        listed = ", ".join(f"{name}: {' and '.join(map(str, shape))}" for name, shape in known.items())
        raise LiteDetrError(f"the checkpoint's {what.format(*found)}; what is supported has {listed}.")
    table = weights.size("backbone.layers.*.attn.relative_position_bias_table")
    return {"backbone": name} | ({"window_size": (math.isqrt(table) + 1) // 2} if table else {})
