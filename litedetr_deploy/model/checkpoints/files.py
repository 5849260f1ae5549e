"""Checkpoint files: read without running what they hold, and written."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ...artifact import CHECKPOINT_SUFFIXES, METADATA_KEY, SUFFIXES, check_file
from ...errors import LiteDetrError
from ...files import replaced_when_done

_WANTED = "a checkpoint, a .pth or .safetensors file"
# What a pickle of tensors, containers and training arguments calls for.
_HARMLESS = re.compile(
    r"collections\.OrderedDict|argparse\.Namespace|_codecs\.encode|torch\._utils\._rebuild_\w+|torch\.\w+"
)


def read_checkpoint(path: str | os.PathLike) -> Mapping:
    """Return what a checkpoint holds, with nothing unpickled but tensors, containers and argparse namespaces.

    Its contents decide what it is read as, not its suffix.  Of a safetensors file: {'model': tensors, 'args': what our
    metadata says}.
    Raises LiteDetrError for anything that is no checkpoint.
    """
    path = Path(path)
    check_file(path, _WANTED)
    if path.suffix.lower() in SUFFIXES:
        raise LiteDetrError(f"{str(path)!r} is a deployed model and no checkpoint. Give the path of {_WANTED}.")
    with open(path, "rb") as file:
        start = file.read(9)
    if not start:
        raise LiteDetrError(f"checkpoint {str(path)!r} is empty. Download or copy it again.")
    contents = _read_safetensors(path) if start[8:] == b"{" else _read_torch(path)
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
            text = (file.metadata() or {}).get(METADATA_KEY, "{}")
            keys = file.keys()
            tensors = {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError, ValueError) as error:
        raise LiteDetrError(
            f"checkpoint {str(path)!r} is not a readable safetensors file: {error}. Download or copy it again."
        ) from error
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise LiteDetrError(
            f"the metadata {METADATA_KEY!r} of checkpoint {str(path)!r} is not a JSON object: {text[:80]!r}. Save the "
            "model again with save_checkpoint, or leave that entry out."
        )
    return {"model": tensors, "args": arguments}


def _read_torch(path: Path) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever bytes that are no pickle make the unpickler do
        if code := sorted(name for name in _calls(path) if not _HARMLESS.fullmatch(name)):
            raise LiteDetrError(
                f"checkpoint {str(path)!r} holds Python code beside its tensors ({', '.join(code)[:200]}), which was "
                "not run. Where you trust the file, save its weights alone, in the environment that wrote it: "
                "torch.save({'model': model.state_dict()}, 'weights.pth')."
            ) from error
        raise LiteDetrError(
            f"checkpoint {str(path)!r} ({path.stat().st_size:,} bytes) is not a PyTorch checkpoint, or is truncated: "
            "download or copy it again and compare its size with the original's."
        ) from error


def _calls(path: Path) -> set[str]:
    """Return what the complete pickles in a file call for, as 'module.name', without unpickling anything."""
    found: set[str] = set()
    with contextlib.suppress(Exception):  # the end, or bytes that are no pickle or no archive
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(".pkl"):
                        with archive.open(name) as member:
                            found.update(_calls_of_pickle(member))
        else:
            with open(path, "rb") as file:
                while True:  # torch.save's older format holds several, and raw numbers behind them
                    found.update(_calls_of_pickle(file))
    return found


def _calls_of_pickle(file: IO[bytes]) -> list[str]:
    calls: list[str] = []
    strings: list[str] = []  # that were pushed, STACK_GLOBAL takes the last two
    memo: dict[int, str] = {}
    top = ""  # of the stack, where it is a string
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name in ("GLOBAL", "INST"):
            calls.append(str(argument).replace(" ", "."))
        elif name == "STACK_GLOBAL":
            calls.append(".".join(strings[-2:]))
        if name == "MEMOIZE":
            memo[len(memo)] = top
        elif name.endswith("PUT"):
            memo[int(argument)] = top
        else:
            top = (
                str(argument)
                if "UNICODE" in name or "STRING" in name
                else memo.get(argument, "")
                if name.endswith("GET")
                else ""
            )
            strings.append(top)
    return calls


def write_checkpoint(path: str | os.PathLike, tensors: Mapping[str, Tensor], arguments: Mapping) -> None:
    """Write a file as `read_checkpoint` reads it, complete or not at all; its suffix says which kind.

    arguments: JSON types.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in CHECKPOINT_SUFFIXES:
        raise LiteDetrError(
            f"a checkpoint cannot be {str(path)!r}: its name must end in {' or '.join(CHECKPOINT_SUFFIXES)}."
        )
    with replaced_when_done(path) as temporary:
        if suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(dict(tensors), temporary, {METADATA_KEY: json.dumps(arguments)})
        else:
            torch.save({"model": dict(tensors), "args": dict(arguments)}, temporary)
