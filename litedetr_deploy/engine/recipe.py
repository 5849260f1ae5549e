"""Recipes: the options of `litedetr export` and `litedetr build` for one model on one target, as a TOML file.

A recipe has a table for each command, [export] and [build]; its keys are the command's options, with _ for -.  What
both need to know of the model, such as its variant, [export] says.  What the command line says counts more.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from ..errors import LiteDetrError, nearest
from ..files import tomllib

COMMANDS = ("export", "build")


def read_recipe(path: str | os.PathLike, command: str, options: Collection[str]) -> dict:
    """Return the options that a recipe gives to `command`, one of COMMANDS, which has those named in `options`.

    Raises LiteDetrError for a file that is no recipe, one that says nothing to the command, and an unknown option.
    """
    try:
        recipe = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise LiteDetrError(f"the recipe {path} cannot be read: {error.strerror}. Check the path.") from error
    except ValueError as error:
        raise LiteDetrError(f"the recipe {path} is not TOML: {error}. Correct it.") from error
    if unknown := set(recipe) - set(COMMANDS):
        raise LiteDetrError(f"the recipe {path} has a table {min(unknown)!r}; its tables are {' and '.join(COMMANDS)}.")
    if command not in recipe:
        raise LiteDetrError(f"the recipe {path} has no table [{command}]: it says nothing to `litedetr {command}`.")
    if unknown := set(recipe[command]) - set(options):
        known = ", ".join(sorted(options)) + "." + nearest(min(unknown), options)
        raise LiteDetrError(f"the recipe {path} gives `litedetr {command}` the option {min(unknown)!r}; it has {known}")
    shared = recipe.get("export", {}) if command == "build" else {}
    return {name: value for name, value in shared.items() if name in options} | recipe[command]
