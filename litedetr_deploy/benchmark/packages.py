"""What is installed, and how to install the rest.  Imports nothing, so that a machine that lacks it can say so."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from ..errors import LiteDetrError

_EXTRAS = {
    "torch": "export", "onnx": "export", "onnxscript": "export", "onnxruntime": "onnxruntime", "openvino": "benchmark",
    "tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx", "pycocotools": "evaluate",
}  # fmt: skip


def is_installed(package: str) -> bool:
    """Return whether `package` can be imported; a folder that happens to have its name cannot."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def missing_packages(packages: Iterable[str], purpose: str = "") -> str:
    """Return which of `packages` are not installed and how to install them, in one line; empty where all are.

    purpose: what they are needed for, as in 'to export it'.
    """
    missing = [package for package in packages if not is_installed(package)]
    if not missing:
        return ""
    remedies = dict.fromkeys(f"pip install litedetr-deploy[{_EXTRAS[name]}]" if name in _EXTRAS else f"pip install {name}"
                             for name in missing)  # fmt: skip
    verb = "are" if missing[1:] else "is"
    return f"{' and '.join(missing)} {verb} not installed{purpose and ' '}{purpose}: {' and '.join(remedies)}"


def require(*packages: str) -> None:
    """Raise LiteDetrError, with what to install, unless all `packages` are installed."""
    if missing := missing_packages(packages):
        raise LiteDetrError(missing[0].upper() + missing[1:] + ".")
