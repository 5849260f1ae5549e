"""State dicts of the official repositories (Lite-DETR, DINO, Deformable DETR and H-DETR), translated by rules that are
read both ways."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..config import DetectorConfig
from ..swin import SHAPES as SWINS

# (their key, our key): the first that fits counts, both ways.  `*` is the same text on both sides; where our key is
# None, inference does not read theirs.
Rules = list[tuple[str, str | None]]

_DINO = DetectorConfig()
_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def translate(key: str, rules: Iterable[tuple[str, str | None]]) -> str | None:
    """Return our key for theirs, None where inference does not read it; a key that no rule fits stays as it is."""
    for source, target in rules:
        before, star, after = source.partition("*")
        if key == source:
            return target
        if star and len(key) > len(before + after) and key.startswith(before) and key.endswith(after):
            return target and target.replace("*", key[len(before) : len(key) - len(after)])
    return key


def theirs(key: str, rules: Rules) -> str:
    return translate(key, ((our, their) for their, our in rules if our is not None)) or key


class Weights:
    """The tensors of a checkpoint, by our keys; names: the checkpoint's own key of each; different: keys of it that
    should hold what another one holds, and do not."""

    def __init__(self, state_dict: Mapping[str, Tensor], rules: Rules):
        self.rules, self.different = rules, list[str]()
        self.tensors, self.names = dict[str, Tensor](), dict[str, str]()
        for name, value in state_dict.items():
            key = translate(name, rules)
            if key is not None and key not in self.tensors:
                self.tensors[key], self.names[key] = value, name
            elif key is not None and not _same(self.tensors[key], value):
                self.different.append(name)

    def having(self, pattern: str) -> list[str]:
        """Return our keys that fit `pattern`, in which `*` stands for anything."""
        return fnmatch.filter(self.tensors, pattern)

    def count(self, prefix: str) -> int:
        """Return how many different numbers follow `prefix` in our keys, as those of layers do."""
        return len({match[1] for key in self.tensors if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", key))})

    def size(self, pattern: str) -> int:
        """Return the first dimension of most tensors of `pattern`, so that no single wrong one decides; 0 of none."""
        sizes = Counter(value.shape[0] for key in self.having(pattern) if (value := self.tensors[key]).ndim)
        return sizes.most_common(1)[0][0] if sizes else 0


def some(names: Iterable[object], limit: int = 4) -> str:
    """Return the first names as text, control characters escaped, and how many more there are."""
    listed = [repr(str(name))[1:-1] for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def is_weight(tensor: Tensor) -> bool:
    return tensor.dtype in _TYPES and tensor.layout == torch.strided and not tensor.is_meta


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or not (is_weight(a) and is_weight(b)):
        return False
    return a.data_ptr() == b.data_ptr() or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def rules(is_dino: bool, decoder_layers: int, has_body: bool) -> Rules:
    """In DINO all layers share one head, which stands under the key of each; in Deformable DETR and H-DETR each layer
    has its own, and the proposals have one more: boxes are refined by all of them, classes are wanted of the last.
    has_body: the backbone is wrapped in one more module; Swin is not in DINO's repository, and is in H-DETR's."""
    heads: dict[str, Sequence[str | None]]
    if is_dino:
        heads = {head: [f"{head}.*"] * decoder_layers for head in ("class_embed", "bbox_embed")}
    else:
        heads = {
            "class_embed": [None] * (decoder_layers - 1) + ["class_embed.*", "enc_out_class_embed.*"],
            "bbox_embed": [f"bbox_embed.{i}.*" for i in range(decoder_layers)] + ["enc_out_bbox_embed.*"],
        }
    unread = ("label_enc.weight", "*.num_batches_tracked", "*.attn.relative_position_index")
    return [
        *((key, None) for key in unread),
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
