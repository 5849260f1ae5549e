"""Checkpoint files: read without running what they hold, and written."""

from __future__ import annotations

import argparse
import json
import os
import pickletools
import re
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...artifact import CHECKPOINT_SUFFIXES, METADATA_KEY, SUFFIXES, check_file, json_object
from ...errors import LiteDetrError
from ...files import replaced_when_done
from . import transformers

_WANTED = "a checkpoint, a .pth or .safetensors file"
_CONFIG = "config.json"  # of a folder of transformers, and what holds its weights
_FILES = ("model.safetensors", "pytorch_model.bin")


def find_checkpoint(name: str | os.PathLike) -> Path:
    """Return the path of a checkpoint: `name` itself or, of a name such as 'SenseTime/deformable-detr' that is no
    path, its folder in the cache of huggingface_hub, where that is installed.  Nothing is downloaded."""
    path = Path(name)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or path.suffix.lower() in CHECKPOINT_SUFFIXES:
        return path
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return path
    cached = {file: try_to_load_from_cache(str(name), file) for file in (_CONFIG, *_FILES)}
    if isinstance(cached[_CONFIG], str) and any(isinstance(cached[file], str) for file in _FILES):
        return Path(cached[_CONFIG]).parent
    raise LiteDetrError(
        f"{name} does not exist, and the cache of huggingface_hub does not have {_CONFIG} and weights of that name. "
        f"Give the path of a checkpoint, or fetch the model with `hf download {name}` first."
    )


def _read_folder(path: Path) -> Mapping:
    """Return {'model': tensors, 'args': what config.json says} of a folder that transformers wrote."""
    text = (path / _CONFIG).read_text(encoding="utf-8", errors="replace")
    config = json_object(text)
    if config is None:
        raise LiteDetrError(f"{path / _CONFIG} is not a JSON object: {text[:80]!r}. Copy or download the folder again.")
    arguments = transformers.arguments(config)
    file = next((path / name for name in _FILES if (path / name).is_file()), None)
    if file is None:
        raise LiteDetrError(
            f"{path} has a {_CONFIG} and no weights: it lacks {' and '.join(_FILES)}. Copy or download it again; "
            "weights in several files are read once model.save_pretrained() has written them as one."
        )
    contents = read_checkpoint(file)
    return {"model": contents["model"] if file.suffix == ".safetensors" else contents, "args": arguments}


def read_checkpoint(path: str | os.PathLike) -> Mapping:
    """Return what a checkpoint holds, with nothing unpickled but tensors, containers and argparse namespaces; of a
    safetensors file, by its suffix or its first bytes, {'model': tensors, 'args': what `write_checkpoint` wrote}."""
    path = Path(path)
    if (path / _CONFIG).is_file():
        return _read_folder(path)
    check_file(path, _WANTED)
    if path.suffix.lower() in SUFFIXES:
        raise LiteDetrError(f"{str(path)!r} is a deployed model and no checkpoint. Give the path of {_WANTED}.")
    with open(path, "rb") as file:
        is_safetensors = path.suffix.lower() == ".safetensors" or file.read(9)[8:] == b"{"
    contents = _read_safetensors(path) if is_safetensors else _read_torch(path)
    if not isinstance(contents, Mapping):
        raise LiteDetrError(
            f"checkpoint {str(path)!r} holds a {type(contents).__name__}; it must hold a dict of tensors, or a dict "
            "whose 'model' is one. Save it with torch.save({'model': model.state_dict()}, path)."
        )
    return contents


def _read_safetensors(path: Path) -> Mapping:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text, keys = (file.metadata() or {}).get(METADATA_KEY, "{}"), file.keys()
            tensors = {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError, ValueError) as error:
        raise LiteDetrError(
            f"checkpoint {str(path)!r} is not a readable safetensors file: {error}. Download or copy it again, or "
            "give it the suffix .pth where torch.save wrote it."
        ) from error
    arguments = json_object(text)
    if arguments is None:
        raise LiteDetrError(
            f"the metadata {METADATA_KEY!r} of checkpoint {str(path)!r} is not a JSON object: {text[:80]!r}. Save the "
            "model again with save_checkpoint, or leave that entry out."
        )
    return {"model": tensors, "args": arguments}


def _read_torch(path: Path) -> object:
    is_archive = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's protocol
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # whatever bytes that are no pickle make the unpickler do
        if "weights_only" in str(error) and (is_archive or tarfile.is_tarfile(path) or _is_pickle(path)):
            names = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise LiteDetrError(
                f"checkpoint {str(path)!r} holds Python code or objects{f' ({names[1]})' if names else ''} beyond "
                "tensors, and none of it was run. Where you trust it, save the weights alone with what wrote them: "
                "torch.save({'model': model.state_dict()}, 'weights.pth')."
            ) from error
        raise LiteDetrError(
            f"checkpoint {str(path)!r} ({path.stat().st_size:,} bytes) is not a PyTorch checkpoint, or is truncated: "
            "download or copy it again and compare its size with the original's."
        ) from error


def _is_pickle(path: Path) -> bool:
    """Whether a file begins with a complete pickle; nothing is unpickled."""
    try:
        with open(path, "rb") as file:
            return sum(1 for _ in pickletools.genops(file)) > 0
    except Exception:  # of many kinds
        return False


def write_checkpoint(path: str | os.PathLike, tensors: Mapping[str, Tensor], arguments: Mapping) -> None:
    """Write what `read_checkpoint` reads, complete or not at all, in the format of the suffix."""
    path = Path(path)
    if path.suffix.lower() not in CHECKPOINT_SUFFIXES:
        raise LiteDetrError(f"checkpoint {str(path)!r} must have a name that ends in {', '.join(CHECKPOINT_SUFFIXES)}.")
    with replaced_when_done(path) as temporary:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import save_file

            save_file(dict(tensors), temporary, {METADATA_KEY: json.dumps(arguments)})
        else:
            torch.save({"model": dict(tensors), "args": dict(arguments)}, temporary)
