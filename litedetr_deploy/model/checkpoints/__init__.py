"""Checkpoints in and out: a file read, recognised and converted, every key accounted for."""

from __future__ import annotations

import argparse
import dataclasses
import os
import reprlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ... import __version__, assets
from ...errors import LiteDetrError
from ..coco import CLASS_NAMES
from ..config import VARIANT_EXAMPLES, DetectorConfig, parse_variant
from ..detector import Detector
from .dialects import read_weights
from .files import find_checkpoint, read_checkpoint, write_checkpoint
from .official import Weights, is_weight, official_key, some, theirs
from .recognise import recognise


def load_model(
    checkpoint: str | os.PathLike | Mapping | None = None, variant: str | None = None, force_variant=False, **overrides
) -> Detector:
    """Return a detector in eval mode.

    Args:
        checkpoint: path of a .pth or .safetensors file, or of a folder of transformers; a state dict under the keys of
            the official repositories, transformers, MMDetection, detrex or this package; the name of weights that come
            with the package ('lite-dino-shapes') or, with huggingface_hub, that are in its cache; None gives random
            weights of `variant`.
        variant: a name such as 'lite-dino-r50-h3l1-2+1x3'; needed where the checkpoint cannot tell.
        force_variant: go on where the variant contradicts the checkpoint's training arguments or the file's name; the
            model's `forced_variant` says then what was overruled.
        overrides: single fields of `DetectorConfig`, whatever the checkpoint says.

    Raises LiteDetrError where the checkpoint cannot be read, recognised or fitted, or is contradictory.
    """
    if unknown := sorted(overrides.keys() - {field.name for field in dataclasses.fields(DetectorConfig)}):
        raise LiteDetrError(f"unknown configuration field {', '.join(unknown)}. DetectorConfig lists those that exist.")
    if checkpoint is None and variant is None:
        raise LiteDetrError(f"load_model needs a checkpoint or a variant, such as {VARIANT_EXAMPLES}.")
    if checkpoint is None:
        model = Detector(parse_variant(variant, **overrides))
        model.class_names = _class_names({}, model.config)
        return model.eval()
    source, file_name = "the state dict", ""
    if not isinstance(checkpoint, Mapping):
        path = assets.path(str(checkpoint)) if checkpoint in assets.NAMES else find_checkpoint(checkpoint)
        source, file_name, checkpoint = f"checkpoint {str(path)!r}", path.name, read_checkpoint(path)
    arguments = checkpoint.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    arguments = arguments if isinstance(arguments, Mapping) else {}
    if arguments.get("value_proj_after"):
        raise LiteDetrError(
            "the checkpoint was trained with value_proj_after = True, which the official code itself cannot run; there "
            "is nothing to deploy it as. Train with value_proj_after = False."
        )
    state_dict = _state_dict(checkpoint, source)
    weights, told = read_weights(state_dict, checkpoint, arguments)
    arguments = told | dict(arguments)
    config, contradiction = recognise(weights, variant, arguments, file_name, force_variant, overrides)
    with torch.device("meta"):
        model = Detector(config)
    model.load_state_dict(_fitted(weights, model), strict=True, assign=True)
    model.class_names, model.forced_variant = _class_names(arguments, config), contradiction
    return model.requires_grad_(False).eval()


def save_checkpoint(model: Detector, path: str | os.PathLike) -> None:
    """Write a model as `load_model` reads it back, as .pth, .pt or .safetensors, complete or not at all: under official
    keys, of a shared head the first one, and with what keys cannot tell as training arguments."""
    config = model.config
    queries = "num_queries_one2one" if config.family == "h-detr" else "num_queries"
    arguments = {
        "enc_scale": config.enc_scale, "num_expansion": config.num_expansion, "nheads": config.num_heads,
        queries: config.num_queries, "implementation": config.implementation, "tool_version": __version__,
    }  # fmt: skip
    if model.class_names:
        arguments["class_names"] = list(model.class_names)
    tensors = {  # copies: those of a checkpoint can be parts of one memory, which safetensors refuses
        official_key(key, config): value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }
    write_checkpoint(path, tensors, arguments)


def _class_names(arguments: Mapping, config: DetectorConfig) -> tuple[str, ...] | None:
    names = arguments.get("class_names")
    if names is None:
        # The labels of a model with COCO's 91 slots are its category ids; MMDetection and detrex number its 80 classes.
        used = CLASS_NAMES if config.implementation == "official" else tuple(n for n in CLASS_NAMES if n != "N/A")
        return used if config.num_classes == len(used) else None
    if not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
        found = reprlib.repr(names)
    elif len(names) != config.num_classes:
        found = f"a list of {len(names)}"
    else:
        return tuple(names)
    raise LiteDetrError(
        f"the checkpoint's class_names is {found}; it must be a list of {config.num_classes} names, one a class. "
        "Correct it in the checkpoint's 'args', or leave it out, and save it again."
    )


def _state_dict(contents: Mapping, source: str) -> dict[str, Tensor]:
    for key in ("model", "state_dict"):
        if isinstance(contents.get(key), Mapping):
            contents = contents[key]
    tensors = {str(key).removeprefix("module."): value for key, value in contents.items() if isinstance(value, Tensor)}
    if not tensors:
        raise LiteDetrError(
            f"{source} holds no tensors; its keys are {some(contents)}. Give a dict of tensors, or one whose "
            "'model' is a dict of tensors."
        )
    return tensors


def _fitted(weights: Weights, model: Detector) -> dict[str, Tensor]:
    """Return the state dict of `model`, every key checked."""
    config = model.config
    rows = {key: weights.parts(key) for key in model.state_dict()}
    wanted = {
        part: torch.Size((value.shape[0] // len(rows[key]), *value.shape[1:])) if len(rows[key]) > 1 else value.shape
        for key, value in model.state_dict().items()
        for part in rows[key]
    }
    found = dict(weights.tensors)
    if not config.key_aware:  # the official module has the projection also where nothing reads it
        found = {key: value for key, value in found.items() if ".query_proj." not in key}
    if config.family == "h-detr" and "tgt_embed.weight" in found:  # the others belong to its one-to-many branch
        found["tgt_embed.weight"] = found["tgt_embed.weight"][: config.num_queries]
    types = [f"{weights.names[key]} ({value.dtype})" for key, value in found.items() if not is_weight(value)]
    if types:
        raise LiteDetrError(
            f"the checkpoint's weights are of a type that is not supported: {some(types)}. Give the floating-point "
            "weights of the training (float32, float16, bfloat16 or float64); INT8 is made by the export."
        )
    shared = "heads that differ between layers, which must be one shared head"
    problems = {
        "missing": [theirs(key, weights.rules) for key in wanted if key not in found],
        "unexpected": [weights.names[key] for key in found if key not in wanted],
        "misshapen": [
            f"{weights.names[key]} is {list(value.shape)}, must be {list(wanted[key])}"
            for key, value in found.items()
            if value.shape != wanted.get(key, value.shape)
        ],
        shared if config.shares_heads else "copies of one head that differ": weights.different,
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {some(keys, 10)}" for what, keys in problems.items() if keys)
        raise LiteDetrError(
            f"the checkpoint does not fit {config.name}. {listed}. Give the checkpoint as the "
            "training saved it, and the variant that was trained."
        )
    return {key: torch.cat([found[part].float() for part in parts]) if len(parts) > 1 else found[key].float()
            for key, parts in rows.items()}  # fmt: skip
