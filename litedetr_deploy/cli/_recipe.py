"""The option --recipe: the defaults of a command's other options come from a file."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LiteDetrError
from ._console import report_error


def _apply(context: typer.Context, path: Path | None):
    if path is None or context.resilient_parsing:
        return path
    from ..engine.recipe import read_recipe

    options = [parameter.name for parameter in context.command.params if parameter.name != "recipe"]
    try:
        context.default_map = read_recipe(path, context.command.name, options)
    except LiteDetrError as error:
        raise report_error(error, error.exit_status, "--json" in sys.argv) from None
    return path


# Eager: the others take their defaults from what it leaves in the context.
Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        callback=_apply,
        is_eager=True,
        help="TOML file with options; what the command line says counts more.",
    ),
]
