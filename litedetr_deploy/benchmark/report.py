"""What reports are made of: tables, bars, the machine in words, and the one writer of JSON, Markdown and PNG."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from ..files import replaced_when_done

COLOURS = ("#d1495b", "#30638e", "#edae49", "#00798c", "#8d6b94", "#5f6368", "#b5838d", "#6a994e")


def three_digits(number: float | None) -> str:
    """Return at least three significant digits, without an exponent; '-' for None."""
    if number is None:
        return "-"
    digits = 2 - math.floor(math.log10(number)) if number > 0 else 0
    return f"{number:.{max(0, digits)}f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str | float | None]]) -> list[str]:
    """Return the lines of a Markdown table, padded for a terminal, with an empty one before.

    A row with other than len(columns) cells, such as a contender without a time and the reason, follows as a list item.
    """
    texts = [[cell if isinstance(cell, str) else three_digits(cell) for cell in row] for row in ([*columns], *rows)]
    cells = [[text.replace("|", "\\|") for text in row] for row in texts]
    whole = [row for row in cells if len(row) == len(columns)]
    widths = [max(3, *(len(row[i]) for row in whole)) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = ["", line(whole[0]), line(rule), *map(line, whole[1:])] if whole[1:] else []
    remarks = [f"- {': '.join(row)}" for row in cells if len(row) != len(columns)]
    return lines + [""] * bool(remarks) + remarks


def machine_text(machine: dict) -> str:
    """Return what a reader needs to know about a machine, as `timing.machine` describes it, in a sentence."""
    gpu = (
        "{name}, {multiprocessors} multiprocessors, compute capability {capability}, {memory_gib} GiB at "
        "{memory_gigabytes_per_second:.0f} GB/s, {l2_mib} MiB L2 at {l2_gigabytes_per_second:.0f} GB/s (copies); "
        "CUDA {cuda}"
    ).format(**machine["gpu"]) if "gpu" in machine else ""  # fmt: skip
    kernel = f", our op's kernel for {machine['op_kernel']}" if "op_kernel" in machine else ""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    load = "load average " + ", ".join(map(str, machine["load_average"]))
    parts = [machine.get("device"), gpu, f"{machine['cpu']}, {machine['cores']} cores{kernel}", machine["os"], packages]
    return "; ".join(filter(None, [*parts, machine["date"], load])) + "."


def write(output: Path, contents: dict, lines: Sequence[str], draw: Callable[[Path], None] | None = None) -> list[Path]:
    """Write `output`.json, .md of the `lines` and, with matplotlib, .png by `draw`: all or none.  Return the paths."""
    endings = (".json", ".md", *([".png"] if draw and importlib.util.find_spec("matplotlib") else []))
    paths = [output.with_name(output.name + ending) for ending in endings]
    with ExitStack() as stack:
        data, text, *chart = (stack.enter_context(replaced_when_done(path)) for path in paths)
        data.write_text(json.dumps(contents, indent=2, allow_nan=False) + "\n")
        text.write_text("\n".join(lines) + "\n")
        if chart:
            draw(chart[0])
    return paths


def draw_bars(axes, names: Sequence[str], bars: Sequence[dict[str, float]], colours: dict[str, str]) -> None:
    """Draw one bar for each name, first on top, stacked from its parts in their colours; the total stands behind it."""
    longest = max((sum(parts.values()) for parts in bars), default=0.0)
    shown = set()
    for place, parts in enumerate(bars):
        start = 0.0
        for name, value in parts.items():
            label = None if name in shown else name
            axes.barh(place, value, 0.7, left=start, color=colours.get(name, "#aaaaaa"), label=label)
            if len(parts) > 1 and value > 0.06 * longest:
                axes.text(start + value / 2, place, f"{value:.0f}", ha="center", va="center", color="white", fontsize=7)
            shown.add(name)
            start += value
        total = three_digits(start) if parts else "no time"
        axes.annotate(total, (start, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    tidy(axes, "x")


def tidy(axes, grid: str) -> None:
    """Take the frame off a panel; grid: 'x', 'y' or 'both'."""
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
