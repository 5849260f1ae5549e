"""State dicts and folders of `transformers`: DeformableDetrForObjectDetection, under the names of version 5 and
those of its files and of older versions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from ...errors import LiteDetrError
from .official import UNREAD, Rules, heads, numbers

MARK = r"model\.(en|de)coder\.layers\."
# config.json -> training arguments, as the official code names them.
_ARGUMENTS = {
    "d_model": "hidden_dim", "encoder_layers": "enc_layers", "decoder_layers": "dec_layers",
    "num_feature_levels": "num_feature_levels", "encoder_attention_heads": "nheads",
}  # fmt: skip
# What the detector does not have, and config.json's values that it has.
_WANTED = {
    "model_type": ("deformable_detr",), "activation_function": ("relu", None),
    "position_embedding_type": ("sine", None), "dilation": (False, None),
}  # fmt: skip


def rules_of(keys: Collection[str], shared: bool | None = None) -> Rules:
    """shared: whether all layers of a one-stage model have one head."""
    layers = numbers(keys, "model.decoder.layers.")
    one_stage = any(key.startswith("model.reference_points.") for key in keys)
    tied = {match[1] for key in keys if (match := re.match(r"(?:model\.decoder\.)?class_embed\.(\d+)\.", key))} == {"0"}
    owners = ("", "model.decoder.")
    classes, boxes = ([f"{owner}{head}.{{}}.*" for owner in owners] for head in ("class_embed", "bbox_embed"))
    backbones = ("model.backbone.conv_encoder.model.", "model.backbone.model.")
    return [
        *UNREAD,
        *heads(classes, dict.fromkeys(boxes, "*"), layers, one_stage and shared is not False,
               last=0 if tied else -1),
        *((backbone + their, "backbone." + our) for backbone in backbones for their, our in _backbone()),
        ("model.query_position_embeddings.weight", "query_embed.weight"),
        ("model.encoder.layers.*.self_attn_layer_norm.*", "encoder.layers.*.norm1.*"),
        ("model.encoder.layers.*.final_layer_norm.*", "encoder.layers.*.norm2.*"),
        ("model.decoder.layers.*.encoder_attn.*", "decoder.layers.*.cross_attn.*"),
        ("model.decoder.layers.*.encoder_attn_layer_norm.*", "decoder.layers.*.norm1.*"),
        ("model.decoder.layers.*.self_attn_layer_norm.*", "decoder.layers.*.norm2.*"),
        ("model.decoder.layers.*.final_layer_norm.*", "decoder.layers.*.norm3.*"),
        *(
            (f"model.decoder.layers.*.self_attn.{part}_proj.*", f"decoder.layers.*.self_attn.in_proj_*[{i}]")
            for i, part in enumerate("qkv")
        ),
        *(
            (f"model.decoder.layers.*.self_attn.{name}.*", "decoder.layers.*.self_attn.out_proj.*")
            for name in ("out_proj", "o_proj")
        ),
        *(
            (f"model.*.layers.*.{owner}fc{i}.*", f"*.layers.*.linear{i}.*")
            for owner in ("mlp.", "")
            for i in (1, 2)
        ),
        ("model.*", "*"),
    ]  # fmt: skip


def _backbone() -> Rules:
    """The rules of transformers' own ResNet; that of timm has our names."""
    return [
        ("embedder.embedder.convolution.*", "conv1.*"),
        ("embedder.embedder.normalization.*", "bn1.*"),
        *(
            (f"encoder.stages.{stage}.layers.*.{their}.*", f"layer{stage + 1}.*.{our}.*")
            for stage in range(4)
            for their, our in (
                ("shortcut.convolution", "downsample.0"), ("shortcut.normalization", "downsample.1"),
                *((f"layer.{i}.convolution", f"conv{i + 1}") for i in range(3)),
                *((f"layer.{i}.normalization", f"bn{i + 1}") for i in range(3)),
            )
        ),
        ("*", "*"),
    ]  # fmt: skip


def arguments(config: Mapping) -> dict:
    """Return what a folder's config.json says, as training arguments; LiteDetrError for what is not supported."""
    for field, wanted in _WANTED.items():
        if config.get(field) not in wanted:
            raise LiteDetrError(
                f"config.json says {field} = {config.get(field)!r}; of transformers' models DeformableDetr with "
                f"{field} = {wanted[0]!r} is supported. Use a checkpoint of that, or export it with its own tools."
            )
    said = {ours: config[theirs] for theirs, ours in _ARGUMENTS.items() if theirs in config}
    if config.get("decoder_attention_heads", said.get("nheads")) != said.get("nheads"):
        raise LiteDetrError(
            f"config.json has {said.get('nheads')} attention heads in the encoder and "
            f"{config['decoder_attention_heads']} in the decoder; they must be equal. Use a checkpoint with as many."
        )
    queries = "two_stage_num_proposals" if config.get("two_stage") else "num_queries"
    if queries in config:
        said["num_queries"] = config[queries]
    names = config.get("id2label")
    if isinstance(names, Mapping):
        numbered = {str(key): name for key, name in names.items()}
        said["class_names"] = [numbered.get(str(i)) for i in range(len(numbered))]
    return said
