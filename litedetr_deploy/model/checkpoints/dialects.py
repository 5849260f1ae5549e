"""Whose state dict it is, by its keys."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ...errors import LiteDetrError
from . import official, transformers
from .official import Weights, some

# A key that only this dialect has -> its module.
_DIALECTS = {
    "transformers": (transformers.MARK, transformers),
    "the official repositories": (r"transformer\.\w+\.layers\.\d+\.(self|cross)_attn\.", official),
}


def read_weights(state_dict: Mapping[str, Tensor], contents: Mapping) -> tuple[Weights, dict]:
    """Return the weights by our keys, and what the dialect says of them, as training arguments.

    contents: the whole checkpoint.  Raises LiteDetrError where keys of several dialects are mixed.
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
    weights = Weights(state_dict, module.rules_of(state_dict))
    if weights.different and weights.having("reference_points.*"):  # one-stage, with box refinement
        weights = Weights(state_dict, module.rules_of(state_dict, shared=False))
    return weights, {}
