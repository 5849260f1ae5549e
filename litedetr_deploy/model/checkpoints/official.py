"""State dicts of the official repositories (Lite-DETR, DINO, Deformable DETR and H-DETR), translated by rules that are
read both ways."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..config import DetectorConfig
from ..swin import SHAPES as SWINS

# (their key, our key): the first that fits counts, both ways.  Each `*` is the same text on both sides; where our key is
# None, inference does not read theirs.  Keys of ours that end in [0], [1] and so on are parts of one tensor, by rows.
Rules = list[tuple[str, str | None]]

_DINO = DetectorConfig()
_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def translate(key: str, rules: Iterable[tuple[str, str | None]]) -> str | None:
    """Return our key for theirs, None where inference does not read it; a key that no rule fits stays as it is."""
    for source, target in rules:
        if match := _pattern(source).fullmatch(key):
            texts = iter(match.groups())
            return target and re.sub(r"\*", lambda _: next(texts), target)
    return key


@functools.cache
def _pattern(source: str) -> re.Pattern:
    return re.compile(re.escape(source).replace(r"\*", "(.+)"))


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

    def parts(self, key: str) -> list[str]:
        """Return the keys of the parts that hold our tensor `key`, or its own."""
        parts = [f"{key}[{i}]" for i in range(3)]
        joined = ".in_proj_" in key and any((our or "").endswith("[0]") for _, our in self.rules)
        return parts if joined else [key]

    def having(self, pattern: str) -> list[str]:
        """Return our keys that fit `pattern`, in which `*` stands for anything."""
        return fnmatch.filter(self.tensors, pattern)

    def count(self, prefix: str) -> int:
        """Return how many different numbers follow `prefix` in our keys, as those of layers do."""
        return numbers(self.tensors, prefix)

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


UNREAD: Rules = [(key, None) for key in ("*.num_batches_tracked", "*.relative_position_index")]


def heads(classes: Sequence[str], boxes: Mapping[str, str], layers: int, shared: bool, last: int = -1) -> Rules:
    """Return the rules of heads, which stand under a number for every layer of the decoder: shared by all of them, or
    each with its own, of which all refine boxes and the last one's classes are wanted.  In DINO by others than its
    authors, Deformable DETR and H-DETR one more is that of the proposals.

    Args:
        classes: their keys, with {} for the number.
        boxes: their keys and, for each, what follows the head's name in ours.
        layers: of the decoder.
        last: the layer whose classes are wanted, where it is not the last one.
    """
    layer_class = [f"class_embed.*" if shared or i == last % layers else None for i in range(layers)]
    layer_box = ["bbox_embed." if shared else f"bbox_embed.{i}." for i in range(layers)]
    return [
        *((key.format(i), our) for key in classes for i, our in enumerate([*layer_class, "enc_out_class_embed.*"])),
        *((key.format(i), our + rest) for key, rest in boxes.items()
          for i, our in enumerate([*layer_box, "enc_out_bbox_embed."])),
    ]  # fmt: skip


def rules(is_dino: bool, decoder_layers: int, has_body: bool, shared: bool | None = None, one_stage=False) -> Rules:
    """has_body: the backbone is wrapped in one more module; Swin is not in DINO's repository, and is in H-DETR's.
    shared: whether all layers have one head, as in DINO by default."""
    owners = ("", "transformer.decoder.")  # which share their heads
    classes, boxes = ([f"{owner}{head}.{{}}.*" for owner in owners] for head in ("class_embed", "bbox_embed"))
    return [
        ("label_enc.weight", None),
        *UNREAD,
        *heads(classes, dict.fromkeys(boxes, "*"), decoder_layers, is_dino or one_stage if shared is None else shared),
        ("backbone.0.body.*" if has_body else "backbone.0.*", "backbone.*"),
        ("input_proj.*", "input_proj.*"),
        *([] if is_dino else [("query_embed.weight", "query_embed.weight" if one_stage else "tgt_embed.weight")]),
        ("transformer.*", "*"),
    ]


def rules_of(keys: Collection[str], shared: bool | None = None) -> Rules:
    """Return the rules for a state dict with these keys; none for one that is not of these repositories."""
    if not any(key.startswith("transformer.") for key in keys):
        return []
    one_stage = any(key.startswith("transformer.reference_points.") for key in keys)
    is_dino = not one_stage and not any(key.startswith("transformer.pos_trans") for key in keys)
    has_body = any(key.startswith("backbone.0.body.") for key in keys)
    return rules(is_dino, numbers(keys, "transformer.decoder.layers."), has_body, shared, one_stage)


def numbers(keys: Iterable[str], prefix: str) -> int:
    """Return how many different numbers follow `prefix`, as those of layers do."""
    return len({match[1] for key in keys if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", key))})


def official_key(key: str, config: DetectorConfig = _DINO) -> str:
    """Return the key under which official checkpoints hold our parameter `key`; of a shared head the first one."""
    has_body = not (config.is_dino and config.backbone in SWINS)
    layers, shared = config.decoder_layers, config.shares_heads
    return theirs(key, rules(config.is_dino, layers, has_body, shared, config.is_one_stage))
