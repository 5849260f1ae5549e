"""State dicts under other people's keys, translated by rules that are read both ways."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# (their key, our key): the first that fits counts, both ways.  `*` is the same text on both sides; where our key is
# None, inference does not read theirs.
Rules = list[tuple[str, str | None]]

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
    """Return their key for ours."""
    return translate(key, ((our, their) for their, our in rules if our is not None)) or key


class Weights:
    """The tensors of a checkpoint, by our keys.

    names: the checkpoint's own key of every tensor.
    different: keys of the checkpoint that should hold what another key of it holds, and do not.
    """

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
    """Return whether `tensor` is of a type that weights can have."""
    return tensor.dtype in _TYPES and tensor.layout == torch.strided and not tensor.is_meta


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or not (is_weight(a) and is_weight(b)):
        return False
    return a.data_ptr() == b.data_ptr() or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
