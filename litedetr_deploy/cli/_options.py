"""The commands' options: a signature says their names, types and defaults, options.toml what they mean."""

import inspect
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LiteDetrError
from ..files import tomllib
from ._console import report_error

_MEANINGS = tomllib.loads(Path(__file__).with_name("options.toml").read_text("utf-8"))


def described(command):
    """Give the parameters of `command` what options.toml says; those without default and flags are arguments."""
    signature = inspect.signature(command, eval_str=True)
    parameters = []
    for name, parameter in signature.parameters.items():
        kind = parameter.annotation
        if not hasattr(kind, "__metadata__"):
            required = parameter.default is parameter.empty
            kind = Annotated[kind, _parameter(name, command.__name__, kind is bool, required)]
        parameters.append(parameter.replace(annotation=kind))
    command.__signature__ = signature.replace(parameters=parameters)
    return command


def _parameter(name, command="all", switch=False, required=False, **settings):
    meaning = (_MEANINGS["all"] | _MEANINGS.get(command, {}))[name]
    settings |= {"help": meaning} if isinstance(meaning, str) else meaning
    flags = settings.pop("flags", [f"--{name.replace('_', '-')}"] if switch else ())  # no --no-... of a switch
    return typer.Argument(**settings) if required and not flags else typer.Option(*flags, **settings)


def _apply_recipe(context: typer.Context, path: Path | None):
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
Recipe = Annotated[Path | None, _parameter("recipe", callback=_apply_recipe, is_eager=True)]

Checkpoint = Annotated[str, _parameter("checkpoint", required=True)]
Variant = Annotated[str | None, _parameter("variant")]
ForceVariant = Annotated[bool, _parameter("force_variant", switch=True)]
ImageSize = Annotated[str, _parameter("image_size")]
Count = Annotated[int | None, _parameter("count")]
AsJson = Annotated[bool, _parameter("as_json")]
