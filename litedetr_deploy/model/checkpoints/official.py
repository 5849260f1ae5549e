"""Official checkpoints in: the variant recognised, every key accounted for.

A state dict tells most of its configuration by its keys and shapes.  What it cannot tell (how many levels are
high-level; whether a model without light feed-forward networks is interleaved) comes from the variant's name,
from the training arguments saved beside the weights, or from the official file name, in this order.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ... import assets
from ...artifact import METADATA_KEY
from ...errors import LiteDetrError
from ..coco import CLASS_NAMES
from ..config import VARIANT_EXAMPLES, DetectorConfig, parse_variant
from ..detector import Detector
from ..resnet import SHAPES
from ..swin import SHAPES as SWINS

# r50_s3ex1_50.2.pth, checkpoint_s2ex3.pth, lite_dino_s3_r50.pth: s = high-level scales, ex = expansions.
_FILE_NAME = re.compile(r"(?:^|[_\-.])s(?P<scale>[123])(?:ex(?P<expansion>[1236]))?(?=[_\-.]|$)")

# Heads are shared between the model and its decoder, in DINO between layers as well: one tensor under many keys.
_HEAD = re.compile(r"(?:transformer\.decoder\.)?(bbox_embed|class_embed)\.(\d+)\.(.+)")
# Swin backbones have no body in DINO's repository, and one in H-DETR's.
_PREFIXES = (("backbone.0.body.", "backbone."), ("backbone.0.", "backbone."), ("transformer.", ""))


def load_model(checkpoint=None, variant: str | None = None, **overrides) -> Detector:
    """A detector in eval mode.

    checkpoint: path of a .pth or .safetensors file, a state dict, or the name of weights that come with the package
        ('lite-dino-shapes'); None gives random weights of `variant`.
    variant: a name such as 'lite-dino-r50-h3l1-2+1x3'; needed where the checkpoint cannot tell.
    overrides: single fields of `DetectorConfig`.
    Raises LiteDetrError for a file that is no checkpoint, for another architecture, and for every missing,
    unexpected or misshapen key.
    """
    if isinstance(checkpoint, str) and checkpoint in assets.NAMES:
        checkpoint = assets.path(checkpoint)
    if checkpoint is None:
        if variant is None:
            raise LiteDetrError(f"load_model needs a checkpoint or a variant, such as {VARIANT_EXAMPLES}.")
        model = Detector(parse_variant(variant, **overrides)).eval()
        model.class_names = _class_names({}, model.config)
        return model
    if isinstance(checkpoint, Mapping):
        state_dict, training, name = _state_dict(checkpoint, "the state dict"), {}, ""
    else:
        contents = read_checkpoint(checkpoint)
        state_dict, training = _state_dict(contents, str(checkpoint)), _training_arguments(contents)
        name = Path(checkpoint).name
    if training.get("value_proj_after"):
        raise LiteDetrError(
            "the checkpoint was trained with value_proj_after = True, which the official code itself cannot run; there "
            "is nothing to deploy it as. Train with value_proj_after = False."
        )
    config = recognise(state_dict, variant, training, name, **overrides)
    with torch.device("meta"):
        model = Detector(config)
    model.load_state_dict(_convert(state_dict, model), strict=True, assign=True)
    model.class_names = _class_names(training, config)
    return model.requires_grad_(False).eval()


def _class_names(training: Mapping, config: DetectorConfig) -> tuple[str, ...] | None:
    names = training.get("class_names")
    if isinstance(names, (list, tuple)) and len(names) == config.num_classes:
        return tuple(map(str, names))
    # The labels of a model with COCO's 91 slots are COCO's category ids.
    return CLASS_NAMES if config.num_classes == len(CLASS_NAMES) else None


def read_checkpoint(path: str | os.PathLike) -> Mapping:
    """The contents of a checkpoint file, with nothing unpickled but tensors, containers and argparse namespaces."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise LiteDetrError(f"checkpoint {path} {what}; it must be a .pth or .safetensors file.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                arguments = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
                return {"model": {key: file.get_tensor(key) for key in file.keys()}, "args": arguments}
        except (SafetensorError, OSError, ValueError) as error:
            raise LiteDetrError(f"checkpoint {path} is not a readable safetensors file: {error}.") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever bytes that are no pickle make the unpickler do
        if "Unsupported global" in str(error) or "not an allowed global" in str(error):
            raise LiteDetrError(
                f"checkpoint {path} holds Python objects beyond tensors, which are not loaded because they can run "
                "code. Re-save the weights alone where you trust the file: "
                "torch.save({'model': checkpoint['model']}, 'weights.pth')."
            ) from error
        raise LiteDetrError(
            f"checkpoint {path} ({path.stat().st_size:,} bytes) is not a PyTorch checkpoint, or is truncated: download "
            "or copy it again and compare its size with the original's."
        ) from error
    if not isinstance(contents, Mapping):
        raise LiteDetrError(
            f"checkpoint {path} holds a {type(contents).__name__}; it must hold a dict of tensors, or a dict whose "
            "'model' is one."
        )
    return contents


def _state_dict(contents: Mapping, source: str) -> dict[str, Tensor]:
    for key in ("model", "state_dict"):
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
    tensors = {k.removeprefix("module."): v for k, v in contents.items() if isinstance(v, Tensor)}
    if not tensors:
        raise LiteDetrError(f"{source} holds no tensors; its keys are {_some(contents)}.")
    return tensors


def _training_arguments(contents: Mapping) -> dict:
    args = contents.get("args")
    return vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}


def recognise(
    state_dict: Mapping[str, Tensor], variant: str | None = None, training: Mapping = {}, name: str = "", **overrides
) -> DetectorConfig:
    """The configuration of an official state dict; raises LiteDetrError where it is no such or cannot be told."""
    fields = _readable_fields(state_dict)
    asked = dict(overrides)
    if "num_queries" not in fields:
        published = parse_variant(f"{fields['family']}-{fields['backbone']}").num_queries
        counts = [training[k] for k in ("num_queries_one2one", "num_queries") if isinstance(training.get(k), int)]
        fields["num_queries"] = next(iter(counts), published)
    if variant is not None:
        named = parse_variant(variant)
        for field in ("family", "backbone"):
            if getattr(named, field) != fields[field]:
                raise LiteDetrError(
                    f"the variant {variant!r} has the {field} {getattr(named, field)}, but the checkpoint's is "
                    f"{fields[field]}."
                )
        if named.is_lite and fields.get("num_expansion", named.num_expansion) != named.num_expansion:
            raise LiteDetrError(
                f"the variant {variant!r} has {named.num_expansion} layers with a light feed-forward network, but the "
                f"checkpoint has {fields['num_expansion']}. Its own variant is {_lite_name(fields)}."
            )
        if not named.is_lite and fields["small_expand"]:
            raise LiteDetrError(
                f"the variant {variant!r} is full-scale, but the checkpoint's layers have light feed-forward networks "
                f"(linear12). Its own variant is {_lite_name(fields)}."
            )
        asked = {"enc_scale": named.enc_scale, "num_expansion": named.num_expansion} | asked
    else:
        match = _FILE_NAME.search(name)
        from_name = {}
        if match:
            from_name["enc_scale"] = int(match["scale"])
            if match["expansion"] and "num_expansion" not in fields:
                from_name["num_expansion"] = int(match["expansion"])
        from_training = {k: training[k] for k in ("enc_scale", "num_expansion") if isinstance(training.get(k), int)}
        if isinstance(training.get("nheads"), int):
            from_training["num_heads"] = training["nheads"]
        asked = from_name | from_training | asked
    if "num_heads" in asked:
        fields["encoder_points"] = fields["encoder_points"] * fields["num_heads"] // asked["num_heads"]
        fields["decoder_points"] = fields["decoder_points"] * fields["num_heads"] // asked["num_heads"]
    fields |= asked
    base = f"{fields['family']}-{fields['backbone']}"
    if "num_expansion" not in fields:
        raise LiteDetrError(
            "the checkpoint cannot tell whether its encoder is full-scale or interleaved (it has no light "
            f"feed-forward networks). Say which with --variant (variant=): {base}, or a Lite one such as "
            f"lite-{base}-h3l1-2+1x3."
        )
    if "enc_scale" not in fields:
        if fields["num_expansion"] < fields["encoder_layers"] or fields["small_expand"]:
            raise LiteDetrError(
                "the checkpoint is a Lite model, and cannot tell how many of its levels are high-level (enc_scale). "
                f"Say which with --variant (variant=): {_lite_name(fields)} (H3L1 or H2L2). The official file names say "
                "it as well: s3 or s2, as in r50_s3ex3_50.4.pth."
            )
        fields["enc_scale"] = fields["num_levels"] - 1
    try:
        return DetectorConfig(**fields)
    except TypeError as error:
        raise LiteDetrError(f"unknown configuration field: {error}.") from error


def _readable_fields(state_dict: Mapping[str, Tensor]) -> dict:
    """What keys and shapes tell."""
    family, backbone = _family(state_dict), _backbone_fields(state_dict)
    missing = [
        key
        for key in ("transformer.level_embed", "transformer.enc_output.weight",
                    "transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
                    "transformer.decoder.layers.0.cross_attn.sampling_offsets.weight",
                    "transformer.encoder.layers.0.linear1.weight",
                    "transformer.decoder.layers.0.linear1.weight",
                    "class_embed.0.weight" if family == "dino" else "transformer.pos_trans.weight")
        if key not in state_dict
    ]  # fmt: skip
    heads = [value for key, value in state_dict.items() if re.fullmatch(r"class_embed\.\d+\.weight", key)]
    if missing or not heads or not backbone:
        lacks = missing or (["backbone.0.*"] if heads else ["class_embed.*.weight"])
        raise LiteDetrError(
            "the checkpoint is of another architecture than (Lite-)DINO, two-stage Deformable DETR or H-DETR with a "
            f"ResNet or Swin backbone: it lacks {_some(lacks)}. Its keys begin with {_some(state_dict)}."
        )

    def width(key: str) -> int:
        return state_dict[f"transformer.{key}"].shape[0]

    num_levels, hidden_dim = state_dict["transformer.level_embed"].shape
    encoder_layers = _count(state_dict, r"transformer\.encoder\.layers\.(\d+)\.")
    light = sorted(
        int(m[1]) for k in state_dict if (m := re.match(r"transformer\.encoder\.layers\.(\d+)\.linear12\.weight", k))
    )
    encoder_offsets = width("encoder.layers.0.self_attn.sampling_offsets.weight")
    decoder_offsets = width("decoder.layers.0.cross_attn.sampling_offsets.weight")
    # Encoder and decoder have as many points; offsets shared by all levels are narrower by their number.
    same_loc = encoder_offsets * num_levels == decoder_offsets
    # Every published model has heads of 32 channels; the number of heads shows in no shape.
    num_heads = max(1, hidden_dim // 32)
    key_aware = "transformer.encoder.layers.0.self_attn.attention_weights.weight" not in state_dict
    fields = {
        "family": family,
        **backbone,
        "num_classes": heads[0].shape[0],
        "hidden_dim": hidden_dim,
        "num_heads": num_heads,
        "num_levels": num_levels,
        "encoder_points": encoder_offsets // (num_heads * (1 if same_loc else num_levels) * 2),
        "decoder_points": decoder_offsets // (num_heads * num_levels * 2),
        "dim_feedforward": width("encoder.layers.0.linear1.weight"),
        "decoder_dim_feedforward": width("decoder.layers.0.linear1.weight"),
        "encoder_layers": encoder_layers,
        "decoder_layers": _count(state_dict, r"transformer\.decoder\.layers\.(\d+)\."),
        "small_expand": bool(light),
        "key_aware": key_aware,
        "proj_key": "transformer.encoder.layers.0.self_attn.key_proj.weight" in state_dict,
        "same_loc": same_loc,
    }
    if family == "dino":
        fields["num_queries"] = width("tgt_embed.weight")
    if light:
        every = encoder_layers // len(light) if encoder_layers % len(light) == 0 else 0
        expected = [i for i in range(encoder_layers) if every and (i + 1) % every == 0]
        if light != expected:
            raise LiteDetrError(
                f"the checkpoint has light feed-forward networks (linear12) in encoder layers {light} of "
                f"{encoder_layers}; an interleaved encoder has them at equal distances, up to the last layer."
            )
        fields["num_expansion"] = len(light)
    elif not key_aware and "transformer.encoder.layers.0.self_attn.query_proj.weight" not in state_dict:
        # Lite-DETR's module always has a query projection; this is the original one, which is full-scale.
        fields["num_expansion"] = encoder_layers
    return fields


def _family(state_dict: Mapping[str, Tensor]) -> str:
    if "transformer.reference_points.weight" in state_dict:
        raise LiteDetrError(
            "the checkpoint is a one-stage Deformable DETR (it has transformer.reference_points); only the two-stage "
            "model with iterative box refinement is supported. Use the checkpoint that was trained with --two_stage "
            "and --with_box_refine."
        )
    if "transformer.pos_trans.weight" not in state_dict:
        return "dino"
    return "h-detr" if "query_embed.weight" in state_dict else "deformable-detr"


def _backbone_fields(state_dict: Mapping[str, Tensor]) -> dict:
    """Empty where there is no backbone that can be read."""
    prefix = "backbone.0.body." if any(key.startswith("backbone.0.body.") for key in state_dict) else "backbone.0."
    if f"{prefix}layer3.0.conv3.weight" in state_dict:
        blocks = _count(state_dict, rf"{re.escape(prefix)}layer3\.(\d+)\.")
        known = {name: stages[2] for name, (_, stages) in SHAPES.items()}
        found, what = blocks, "ResNet has {} blocks in layer3"
    elif f"{prefix}patch_embed.proj.weight" in state_dict:
        known = {name: (dim, stages[2]) for name, (dim, stages, _) in SWINS.items()}
        blocks = _count(state_dict, rf"{re.escape(prefix)}layers\.2\.blocks\.(\d+)\.")
        found, what = (
            (state_dict[f"{prefix}patch_embed.proj.weight"].shape[0], blocks),
            "Swin has {} channels and blocks",
        )
    else:
        return {}
    name = next((name for name, shape in known.items() if shape == found), None)
    if name is None:
        listed = ", ".join(f"{name} {shape}" for name, shape in known.items())
        raise LiteDetrError(f"the checkpoint's {what.format(found)}; the known ones have: {listed}.")
    table = state_dict.get(f"{prefix}layers.0.blocks.0.attn.relative_position_bias_table")
    return {"backbone": name} | ({} if table is None else {"window_size": (math.isqrt(table.shape[0]) + 1) // 2})


def _count(state_dict: Mapping[str, Tensor], pattern: str) -> int:
    return len({m[1] for key in state_dict if (m := re.match(pattern, key))})


def _lite_name(fields: Mapping) -> str:
    expansions = fields.get("num_expansion", 3)
    between = fields["encoder_layers"] // expansions
    name = f"lite-{fields['family']}-{fields['backbone']}-{{}}-{between}+1x{expansions}"
    return f"{name.format('h3l1')} or {name.format('h2l2')}"


def _our_key(key: str, config: DetectorConfig) -> str | None:
    """None for parameters of the official models that inference does not read."""
    if key == "label_enc.weight" or key.endswith((".num_batches_tracked", ".attn.relative_position_index")):
        return None
    if not config.key_aware and ".query_proj." in key:
        return None
    if match := _HEAD.fullmatch(key):
        head, layer, rest = match[1], int(match[2]), match[3]
        if config.is_dino:
            return f"{head}.{rest}"
        # One head for every layer, and one more for the proposals; boxes are refined by all, classes wanted of the last.
        if layer == config.decoder_layers:
            return f"enc_out_{head}.{rest}"
        if head == "class_embed" and layer < config.decoder_layers:
            return f"{head}.{rest}" if layer == config.decoder_layers - 1 else None
        return f"{head}.{layer}.{rest}"
    if key == "query_embed.weight" and config.family == "h-detr":
        return "tgt_embed.weight"
    for official, ours in _PREFIXES:
        if key.startswith(official):
            return ours + key.removeprefix(official)
    return key


def _convert(state_dict: Mapping[str, Tensor], model: Detector) -> dict[str, Tensor]:
    """The state dict under our names, every key checked."""
    config = model.config
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found: dict[str, Tensor] = {}
    unexpected, misshapen, different = [], [], []
    for key, value in state_dict.items():
        ours = _our_key(key, config)
        if ours is None:
            continue
        if key == "query_embed.weight":
            value = value[: config.num_queries]  # the others belong to H-DETR's one-to-many branch
        if ours not in wanted:
            unexpected.append(key)
        elif tuple(value.shape) != wanted[ours]:
            misshapen.append(f"{key} is {list(value.shape)}, must be {list(wanted[ours])}")
        elif ours in found:
            if found[ours].data_ptr() != value.data_ptr() and not torch.equal(found[ours], value):
                different.append(key)
        else:
            found[ours] = value.float()
    shared = "heads that differ between layers, which must be one shared head"
    problems = [
        ("missing", [official_key(key, config) for key in wanted if key not in found]),
        ("unexpected", unexpected),
        ("misshapen", misshapen),
        (shared if config.is_dino else "copies of one head that differ", different),
    ]
    if any(keys for _, keys in problems):
        listed = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in problems if keys)
        raise LiteDetrError(f"the checkpoint does not fit {config.name} ({_summary(config)}). {listed}.")
    return found


def official_key(key: str, config: DetectorConfig = DetectorConfig()) -> str:
    """The key under which official checkpoints hold our parameter `key` (of a shared head, the first alias)."""
    first, _, rest = key.partition(".")
    if first == "backbone":
        return f"backbone.0.{rest}" if config.is_dino and config.backbone in SWINS else f"backbone.0.body.{rest}"
    if first == "input_proj":
        return key
    if config.is_dino:
        return f"{first}.0.{rest}" if first in ("bbox_embed", "class_embed") else f"transformer.{key}"
    if first.startswith("enc_out_"):
        return f"{first.removeprefix('enc_out_')}.{config.decoder_layers}.{rest}"
    if first == "class_embed":
        return f"class_embed.{config.decoder_layers - 1}.{rest}"
    if first == "bbox_embed":
        return key
    return "query_embed.weight" if first == "tgt_embed" else f"transformer.{key}"


def _summary(config: DetectorConfig) -> str:
    default = parse_variant(config.name)
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(default, field.name)
    }
    return ", ".join(f"{k}={v}" for k, v in changed.items()) or "as published"


def _some(keys, limit: int = 4) -> str:
    keys = [str(key) for key in keys]
    shown = ", ".join(keys[:limit])
    return f"{shown} and {len(keys) - limit} more" if len(keys) > limit else shown
