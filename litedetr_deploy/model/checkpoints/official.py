"""The keys of the official repositories: Lite-DETR, DINO, Deformable DETR and H-DETR."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from ..config import DetectorConfig
from ..swin import SHAPES as SWINS
from .keys import Rules, theirs

_DINO = DetectorConfig()


def rules(is_dino: bool, decoder_layers: int, has_body: bool) -> Rules:
    """Return the rules for a detector.

    Args:
        is_dino: in DINO all layers share one head, which stands under the key of each; in Deformable DETR and H-DETR
            each layer has its own, and the proposals have one more. Boxes are refined by all of them, classes are
            wanted of the last.
        has_body: the backbone is wrapped in one more module; Swin is not in DINO's repository, and is in H-DETR's.
    """
    heads: dict[str, Sequence[str | None]]
    if is_dino:
        heads = {head: [f"{head}.*"] * decoder_layers for head in ("class_embed", "bbox_embed")}
    else:
        heads = {
            "class_embed": [None] * (decoder_layers - 1) + ["class_embed.*", "enc_out_class_embed.*"],
            "bbox_embed": [f"bbox_embed.{i}.*" for i in range(decoder_layers)] + ["enc_out_bbox_embed.*"],
        }
    return [
        # Inference does not read these.
        ("label_enc.weight", None),
        ("*.num_batches_tracked", None),
        ("*.attn.relative_position_index", None),
        *(
            (f"{owner}{head}.{layer}.*", ours)
            for owner in ("", "transformer.decoder.")  # which share their heads
            for head, keys in heads.items()
            for layer, ours in enumerate(keys)
        ),
        ("backbone.0.body.*" if has_body else "backbone.0.*", "backbone.*"),
        ("input_proj.*", "input_proj.*"),
        *([] if is_dino else [("query_embed.weight", "tgt_embed.weight")]),
        ("transformer.*", "*"),
    ]


def rules_of(keys: Collection[str]) -> Rules:
    """Return the rules for a state dict with these keys; none for one that is not of these repositories."""
    if not any(key.startswith("transformer.") for key in keys):
        return []
    layers = {match[1] for key in keys if (match := re.match(r"transformer\.decoder\.layers\.(\d+)\.", key))}
    is_dino = not any(key.startswith("transformer.pos_trans") for key in keys)
    return rules(is_dino, len(layers), any(key.startswith("backbone.0.body.") for key in keys))


def official_key(key: str, config: DetectorConfig = _DINO) -> str:
    """Return the key under which official checkpoints hold our parameter `key`; of a shared head the first one."""
    has_body = not (config.is_dino and config.backbone in SWINS)
    return theirs(key, rules(config.is_dino, config.decoder_layers, has_body))
