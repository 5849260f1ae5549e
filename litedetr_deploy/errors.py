"""Errors meant for the person at the keyboard: one paragraph that says what is wrong, the value, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Top-level module -> the extra of this package that brings it.
EXTRAS = {
    "av": "video", "cuda": "gpu", "matplotlib": "benchmark", "onnx": "export", "onnx_ir": "export",
    "onnxruntime": "onnxruntime", "onnxscript": "export", "openvino": "openvino", "pyarrow": "ray",
    "pycocotools": "evaluate", "ray": "ray", "safetensors": "export", "scipy": "train", "torch": "export",
}  # fmt: skip


class LiteDetrError(Exception):
    """Wrong use or bad input.  The message is the whole report; the command line exits with 2."""

    exit_status = 2


class CheckFailed(LiteDetrError):
    """The input was fine, the work was done, and a check of its result failed.  The command line exits with 1."""

    exit_status = 1


class Notice(UserWarning):
    """What a user should know of a result, in one sentence.  The command line prints it on stderr."""


def not_installed(error: ImportError, needed_for: str = "This") -> LiteDetrError | None:
    """Return the error that names the extra to install for a failed import; None where no extra brings the module."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    return LiteDetrError(
        f"{needed_for} needs {module}, which cannot be imported ({error}). Install it with "
        f"`pip install litedetr-deploy[{EXTRAS[module]}]`."
    )


def printable(text: object) -> str:
    """Return `text` with control characters, newlines among them, escaped: it keeps to its line and moves no cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def nearest(word: str, words: Iterable[str]) -> str:
    """Return the sentence that suggests the word of `words` most like `word`, a space before it; '' for none."""
    found = difflib.get_close_matches(word, list(words), 1)
    return f" Did you mean {found[0]!r}?" if found else ""
