"""State dicts of MMDetection 3: DINO and Deformable DETR.  Their data preprocessor makes RGB of BGR and normalises with
ImageNet's mean and deviation, in 0..255, as our graph does in 0..1."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from ...errors import LiteDetrError
from .official import UNREAD, Rules, Weights, heads, neck, numbers

MARK = r"bbox_head\."


def rules_of(keys: Collection[str], shared: bool | None = None) -> Rules:
    """shared: whether all layers of a one-stage model have one head."""
    if any(key.startswith("bbox_head.transformer.") for key in keys):
        raise LiteDetrError(
            "the checkpoint has the key names of MMDetection 2 (bbox_head.transformer); those of MMDetection 3 are "
            "supported. Load and save it with the tools of MMDetection 3, or use the checkpoint of its model zoo."
        )
    is_dino = any(key.startswith("decoder.ref_point_head.") for key in keys)
    one_stage = any(key.startswith("reference_points_fc.") for key in keys)
    boxes = {f"bbox_head.reg_branches.{{}}.{2 * i}.*": f"layers.{i}.*" for i in range(3)}  # ReLUs between them
    layers = numbers(keys, "decoder.layers.")
    return [
        ("dn_query_generator.*", None),
        *UNREAD,
        *heads(["bbox_head.cls_branches.{}.*"], boxes, layers, one_stage and shared is not False),
        *neck(keys, "gn"),
        ("query_embedding.weight", "tgt_embed.weight" if is_dino else "query_embed.weight"),
        ("memory_trans_fc.*", "enc_output.*"),
        ("memory_trans_norm.*", "enc_output_norm.*"),
        ("pos_trans_fc.*", "pos_trans.*"),
        ("reference_points_fc.*", "reference_points.*"),
        ("*coder.layers.*.ffn.layers.0.0.*", "*coder.layers.*.linear1.*"),
        ("*coder.layers.*.ffn.layers.1.*", "*coder.layers.*.linear2.*"),
        ("decoder.layers.*.self_attn.attn.*", "decoder.layers.*.self_attn.*"),
        ("encoder.layers.*.norms.0.*", "encoder.layers.*.norm1.*"),
        ("encoder.layers.*.norms.1.*", "encoder.layers.*.norm2.*"),
        # In the order of computation; the official names are not.
        ("decoder.layers.*.norms.0.*", "decoder.layers.*.norm2.*"),
        ("decoder.layers.*.norms.1.*", "decoder.layers.*.norm1.*"),
        ("decoder.layers.*.norms.2.*", "decoder.layers.*.norm3.*"),
        ("backbone.patch_embed.projection.*", "backbone.patch_embed.proj.*"),
        ("backbone.stages.*.attn.w_msa.*", "backbone.layers.*.attn.*"),
        ("backbone.stages.*.ffn.layers.0.0.*", "backbone.layers.*.mlp.fc1.*"),
        ("backbone.stages.*.ffn.layers.1.*", "backbone.layers.*.mlp.fc2.*"),
        ("backbone.stages.*", "backbone.layers.*"),
    ]


def adapt(weights: Weights) -> None:
    """Convert, in place, what is not only named otherwise."""
    tensors = weights.tensors
    for key, value in list(tensors.items()):
        bias = key.removesuffix("weight") + "bias"
        if key.startswith("input_proj.") and value.ndim == 4 and bias not in tensors:
            # By default, convolutions before a normalisation have no bias.
            tensors[bias], weights.names[bias] = value.new_zeros(value.shape[0]), weights.names[key]
        if key.startswith("backbone.layers.") and ".downsample." in key and value.ndim and value.shape[-1] % 4 == 0:
            tensors[key] = merged_as_official(value)


def merged_as_official(value: torch.Tensor) -> torch.Tensor:
    """Reorder the last dimension of a patch merging's weights: MMDetection unfolds 2 x 2 tokens channel by channel,
    row by row in it; the official code concatenates the channels of the tokens, column by column."""
    return value.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)


def arguments(contents: Mapping) -> dict:
    """Return what the checkpoint says, as training arguments."""
    meta = contents.get("meta") if isinstance(contents.get("meta"), Mapping) else {}
    dataset = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), Mapping) else meta
    names = dataset.get("classes", dataset.get("CLASSES"))
    said: dict = {"implementation": "mmdetection"}
    return said | ({"class_names": names} if isinstance(names, (list, tuple)) else {})
