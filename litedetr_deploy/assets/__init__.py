"""Weights that come with the package; README.md beside this file is their model card."""

from pathlib import Path

NAMES = ("lite-dino-shapes",)


def path(name: str) -> Path:
    """The weights' file."""
    return Path(__file__).parent / f"{name}.safetensors"
