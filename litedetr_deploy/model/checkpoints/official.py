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

from ...errors import LiteDetrError
from ..config import DetectorConfig
from ..swin import SHAPES as SWINS

# (their key, our key): the first that fits counts, both ways.  Each `*` is the same text on both sides; where our key
# is None, inference does not read theirs.  Keys of ours that end in [0], [1] and so on are parts of one tensor, by
# rows.
Rules = list[tuple[str, str | None]]

_DINO = DetectorConfig()
_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def translate(key: str, rules: Iterable[tuple[str, str | None]]) -> str | None:
    """Return our key for theirs, None where inference does not read it; a key that no rule fits stays as it is."""
    for source, target in rules:
        if match := _pattern(source).fullmatch(key):
            return target and target.replace("*", "{}").format(*match.groups())
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

# Model and decoder share their heads.
OWNED = {
    head: [f"{owner}{head}.{{}}.*" for owner in ("", "transformer.decoder.")] for head in ("class_embed", "bbox_embed")
}


def heads(
    classes: Sequence[str], boxes: Mapping[str, str], layers: int, shared: bool, proposals: bool = True, last: int = -1
) -> Rules:
    """Return the rules of heads, which stand under a number for every layer of the decoder: shared by all of them, or
    each with its own, of which all refine boxes and the last one's classes are wanted.

    Args:
        classes: their keys, with {} for the number.
        boxes: their keys and, for each, what follows the head's name in ours.
        layers: of the decoder.
        proposals: whether one more number is the head of the proposals.
        last: the layer whose classes are wanted, where it is not the last one.
    """
    layer_class = ["class_embed.*" if shared or i == last % layers else None for i in range(layers)]
    layer_box = ["bbox_embed." if shared else f"bbox_embed.{i}." for i in range(layers)]
    if proposals:
        layer_class, layer_box = [*layer_class, "enc_out_class_embed.*"], [*layer_box, "enc_out_bbox_embed."]
    return [
        *((key.format(i), our) for key in classes for i, our in enumerate(layer_class)),
        *((key.format(i), our + rest) for key, rest in boxes.items() for i, our in enumerate(layer_box)),
    ]


def neck(keys: Collection[str], norm: str) -> Rules:
    """Return the rules of MMDetection's and detrex's ChannelMapper, whose normalisation is called `norm`."""
    maps = numbers(keys, "neck.convs.")
    if maps == 4:
        raise LiteDetrError(
            "the checkpoint is a five-scale model, which takes four maps of its backbone (it has neck.convs.3); the "
            "detectors of this package take three. Use the four-scale model."
        )
    projections = {**{f"convs.{i}": i for i in range(maps)}, **{f"extra_convs.{i}": maps + i for i in range(5)}}
    return [
        (f"neck.{their}.{part}.*", f"input_proj.{our}.{index}.*")
        for their, our in projections.items()
        for index, part in enumerate(("conv", norm))
    ]


def rules(is_dino: bool, decoder_layers: int, has_body: bool, shared: bool | None = None, one_stage=False) -> Rules:
    """has_body: the backbone is wrapped in one more module; Swin is not in DINO's repository, and is in H-DETR's.
    shared: whether all layers have one head, as in DINO by default."""
    classes, boxes = OWNED["class_embed"], dict.fromkeys(OWNED["bbox_embed"], "*")
    shared = is_dino or one_stage if shared is None else shared
    return [
        ("label_enc.weight", None),
        *UNREAD,
        *heads(classes, boxes, decoder_layers, shared, not is_dino),
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
