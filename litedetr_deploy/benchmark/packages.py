"""What is installed, and how to install the rest."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from ..errors import not_installed


def is_installed(package: str) -> bool:
    """Return whether `package` can be imported; a folder that happens to have its name cannot."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def missing_packages(packages: Iterable[str], purpose: str = "it") -> str:
    """Return which of `packages` are not installed and how to install them; empty where all are.

    purpose: what needs them, as in 'the export'.
    """
    sentences = []
    for package in packages:
        if not is_installed(package):
            known = not_installed(ImportError("not installed", name=package), purpose)
            extra = package.replace("_", "-")
            sentences.append(str(known or f"{purpose} needs {package}: pip install litedetr-deploy[{extra}]"))
    return " ".join(sentences)
