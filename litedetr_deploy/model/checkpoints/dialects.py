"""Whose state dict it is, by its keys."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ...errors import LiteDetrError
from . import detrex, mmdetection, official, transformers
from .official import Weights, some

# A key that only this dialect has -> its module.
_DIALECTS = {
    "transformers": (transformers.MARK, transformers),
    "MMDetection": (mmdetection.MARK, mmdetection),
    "detrex": (detrex.MARK, detrex),
    "the official repositories": (r"transformer\.\w+\.layers\.\d+\.(self|cross)_attn\.", official),
}


def read_weights(state_dict: Mapping[str, Tensor], contents: Mapping, arguments: Mapping) -> tuple[Weights, dict]:
    """Return the weights by our keys, and what the dialect says of them, as training arguments.

    contents: the whole checkpoint; arguments: those of its training.  Raises LiteDetrError where keys of several
    dialects are mixed.
    """
    found = {
        name: (key, module)
        for name, (mark, module) in _DIALECTS.items()
        if (key := next((key for key in state_dict if re.match(mark, key)), None))
    }
    if len(found) > 1:
        listed = " and ".join(f"{name} ({some([key])})" for name, (key, _) in found.items())
        raise LiteDetrError(
            f"the checkpoint mixes the key names of {listed}. Give one model's state dict, as its training saved it."
        )
    module = next((module for _, module in found.values()), official)
    # A DINO of another implementation, under official keys.
    is_dino = any(key.startswith("transformer.decoder.ref_point_head.") for key in state_dict)
    own_heads = is_dino and arguments.get("implementation", "official") != "official"
    weights = Weights(state_dict, module.rules_of(state_dict, False if own_heads else None))
    if weights.different and weights.having("reference_points.*"):  # one-stage, with box refinement
        weights = Weights(state_dict, module.rules_of(state_dict, False))
    if module is mmdetection:
        mmdetection.adapt(weights)
    return weights, module.arguments(contents) if module in (mmdetection, detrex) else {}
