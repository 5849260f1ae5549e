"""What is installed, and how to install the rest."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from ..errors import EXTRAS


def is_installed(package: str) -> bool:
    """Return whether `package` can be imported; a folder that happens to have its name cannot."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def missing_packages(packages: Iterable[str]) -> str:
    """Return which of `packages` are not installed and how to install them; empty where all are."""
    missing = [package for package in dict.fromkeys(packages) if not is_installed(package)]
    extras = ",".join(dict.fromkeys(EXTRAS.get(package, package.replace("_", "-")) for package in missing))
    verb = "are" if missing[1:] else "is"
    return f"{', '.join(missing)} {verb} not installed: pip install litedetr-deploy[{extras}]" if missing else ""
