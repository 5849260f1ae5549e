"""The text form of protocol buffers, in which Triton reads a model's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Word(str):
    """A value of an enumeration, as in TYPE_FP32: written without quotes."""


def to_text(fields: Mapping[str, Any], indent: str = "") -> str:
    """Return a message: a mapping is a message in it, a list of mappings a repeated one."""
    lines = []
    for name, value in fields.items():
        messages = [value] if isinstance(value, Mapping) else value if isinstance(value, list) else None
        if messages and isinstance(messages[0], Mapping):
            lines += [f"{indent}{name} {{\n{to_text(one, indent + '  ')}{indent}}}\n" for one in messages]
        else:
            text = f"[{', '.join(map(_scalar, value))}]" if isinstance(value, list) else _scalar(value)
            lines.append(f"{indent}{name}: {text}\n")
    return "".join(lines)


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not isinstance(value, Word):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    return str(value)
