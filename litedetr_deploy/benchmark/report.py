"""Results as JSON, as Markdown and as a picture."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

from ..files import replaced_when_done
from .latency import MEASURED, SCHEMA, Result
from .parts import PARTS

# Times in milliseconds; 'ratio' to the first; 'error': see HOW.
COLUMNS = ("contender", "median", "p90", "p99", "calls", "images/s", "ratio", "encoder", "MiB", "error")
COLOURS = ("#d1495b", "#30638e", "#edae49", "#00798c", "#8d6b94", "#5f6368", "#b5838d", "#6a994e")
HOW = (
    "Every contender runs in a process of its own; those of a table are loaded together and called in turns, each "
    "short call right after an untimed one of its own. Before it is timed, a contender's output on one picture is "
    "compared with PyTorch's in float32 given the same choice of queries; 'error' is its largest difference as a "
    "share of what is allowed. Times are in milliseconds, 'ratio' is to the first of the table, and MiB is the most "
    "that was resident in the process, or the memory that it took of the GPU. The parts are medians of other calls, "
    "in turns again, watched by ONNX Runtime's profile or by hooks in PyTorch; positions, which an exported graph has "
    "as constants, are among 'other' in PyTorch. Batch norms are folded in all of them."
)


def groups(results: Sequence[Result]) -> list[list[Result]]:
    return [list(group) for _, group in groupby(results, lambda result: result.row.group)]


def group_title(group: Sequence[Result]) -> str:
    row = group[0].row
    where = "CUDA" if row.device == "cuda" else f"CPU, {row.threads} thread{'s' if row.threads > 1 else ''}"
    return f"{row.image_size[0]}x{row.image_size[1]}, batch {row.batch}, {where}"


def table_rows(group: Sequence[Result]) -> list[list[str]]:
    """A list of cells for every result; of one without a time, its name and the reason."""
    first = next((result.median for result in group if result.status == MEASURED), None)
    rows = []
    for result in group:
        if result.status != MEASURED:
            rows.append([result.row.contender, f"{result.status}: {result.trouble}"])
            continue
        figures = result.to_dict()
        check = max((row["difference"] / row["tolerance"] for row in result.check or []), default=None)
        memory = result.device_memory_bytes or result.memory_bytes
        rows.append([
            result.row.contender,
            *(three_digits(figures[name]) for name in ("median_ms", "p90_ms", "p99_ms")),
            str(figures["calls"]),
            three_digits(figures["images_per_second"]),
            f"{result.median / first:.2f}",
            three_digits(figures["encoder_ms"]),
            "-" if memory is None else f"{memory / 2**20:.0f}",
            "none" if check is None else f"{check:.1%}",
        ])  # fmt: skip
    return rows


def three_digits(number: float | None) -> str:
    """At least three significant digits, without an exponent."""
    if number is None:
        return "-"
    digits = 2 - math.floor(math.log10(number)) if number > 0 else 0
    return f"{number:.{max(0, digits)}f}"


def as_dict(results: Sequence[Result], machine: dict, settings: dict) -> dict:
    return {
        "benchmark": "latency",
        "schema": SCHEMA,
        "machine": machine,
        "settings": settings,
        "results": [result.to_dict() for result in results],
    }


def as_markdown(results: Sequence[Result], machine: dict) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    device = f"{machine['device']}; " if "device" in machine else ""
    load = ", ".join(map(str, machine["load_average"]))
    lines = [
        "# Latency of detectors",
        "",
        f"{device}{machine['cpu']}, {machine['cores']} cores, our op's kernel for {machine.get('op_kernel', 'none')}; "
        f"{machine['os']}; {packages}; {machine['date']}; load average {load}.",
        "",
        HOW,
    ]
    for group in groups(results):
        lines += ["", f"## {group_title(group)}", "", *markdown_table(COLUMNS, table_rows(group))]
        measured = [result for result in group if result.status == MEASURED]
        if parts := [result for result in measured if result.parts]:
            names = [part for part in PARTS if any(part in result.parts for result in parts)]
            rows = [[r.row.contender, *(_milliseconds(r.parts.get(part)) for part in names)] for r in parts]
            lines += ["", "By part, ms:", "", *markdown_table(("contender", *names), rows)]
        if encoders := [result for result in measured if result.encoder_operators]:
            lines += ["", "The encoder by operator, ms:", "", *_operator_table(encoders)]
        if power := [result for result in measured if result.power]:
            lines += [
                "",
                "Power, while called without a pause:",
                "",
                *markdown_table(POWER_COLUMNS, map(_power_row, power)),
            ]
        if engines := [result for result in measured if result.trtexec_ms is not None]:
            rows = [
                [result.row.contender, three_digits(result.median * 1e3), three_digits(result.trtexec_ms)]
                for result in engines
            ]
            lines += ["", "Against trtexec, median ms:", "", *markdown_table(("contender", "here", "trtexec"), rows)]
    if points := _known_models(results):
        rows = [[model, three_digits(gflops), three_digits(ap)] for model, (gflops, ap) in points.items()]
        lines += ["", "## Models", "", "GFLOPs of one image as the paper counts (multiply-adds); AP as published for "
                  "the trained weights.", "", *markdown_table(("model", "GFLOPs", "AP"), rows)]  # fmt: skip
    return "\n".join(lines) + "\n"


POWER_COLUMNS = ("contender", "watts", "J/image", "MHz", "lowest MHz", "°C", "throttling")


def _power_row(result: Result) -> list[str]:
    power = result.power
    figures = (power[name] for name in ("watts", "joules_per_image", "clock_mhz", "lowest_clock_mhz", "temperature_c"))
    return [result.row.contender, *map(three_digits, figures), ", ".join(power["throttling"]) or "no"]


def _operator_table(results: Sequence[Result]) -> list[str]:
    """The operators that take a hundredth of the slowest encoder, in the order of their time; the rest as one."""
    most = Counter()
    for result in results:
        most |= Counter(result.encoder_operators)
    least = max(sum(result.encoder_operators.values()) for result in results) / 100
    names = [name for name, seconds in most.most_common() if seconds >= least]
    rows = []
    for result in results:
        shown = [result.encoder_operators.get(name) for name in names]
        rest = sum(result.encoder_operators.values()) - sum(seconds or 0.0 for seconds in shown)
        rows.append([result.row.contender, *map(_milliseconds, shown), _milliseconds(max(0.0, rest))])
    return markdown_table(("contender", *names, "the rest"), rows)


def _known_models(results: Sequence[Result]) -> dict[str, tuple[float, float | None]]:
    return {
        f"{result.row.model}, {result.row.image_size[0]}x{result.row.image_size[1]}": (result.gflops, result.ap)
        for result in results
        if result.status == MEASURED and result.gflops
    }


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else three_digits(seconds * 1e3)


def markdown_table(columns: Sequence[str], rows) -> list[str]:
    lines = [list(columns), ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [row + [""] * (len(columns) - len(row)) for row in rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def draw(results: Sequence[Result], machine: dict, path: Path) -> None:
    """A PNG with a row of panels for every group: bars by part, latency against GFLOPs, latency against AP."""
    from matplotlib.figure import Figure

    drawn = [group for group in groups(results) if any(result.status == MEASURED for result in group)]
    longest = max(map(len, drawn))  # its bars set the height of all
    figure = Figure(figsize=(17, len(drawn) * max(3.6, 1.9 + 0.34 * longest)), layout="constrained")
    panels = figure.subplots(len(drawn), 3, squeeze=False, width_ratios=(2, 1, 1))
    backends = list(dict.fromkeys(result.row.backend for group in drawn for result in group))
    for (bars, flops, ap), group in zip(panels, drawn):
        measured = [result for result in group if result.status == MEASURED]
        _draw_bars(bars, measured)
        bars.set_title(group_title(group), fontsize=10)
        _draw_points(flops, measured, "gflops", "GFLOPs of one image", backends)
        _draw_points(ap, measured, "ap", "AP, published", backends)
    figure.suptitle(
        f"Latency of detectors: {machine.get('device') or machine['cpu']}, {machine['date'][:10]}", fontsize=11
    )
    figure.savefig(path, format="png", dpi=130)


def _draw_bars(axes, measured: Sequence[Result]) -> None:
    shown = set()
    for place, result in enumerate(measured):
        start = 0.0
        whole = result.median * 1e3
        # The watched call took another time than the median one: its shares are shown.
        parts = result.parts or {"whole": result.median}
        scale = whole / sum(parts.values())
        for part, seconds in parts.items():
            colour = COLOURS[PARTS.index(part)] if part in PARTS else "#aaaaaa"
            label = None if part in shown else part
            shown.add(part)
            axes.barh(place, seconds * scale, 0.7, left=start, color=colour, label=label)
            start += seconds * scale
        text = {"textcoords": "offset points", "va": "center", "fontsize": 7}
        axes.annotate(f"{three_digits(whole)} ms", (whole, place), (3, 0), **text)
    axes.set_yticks(range(len(measured)), [result.row.contender for result in measured], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("median, milliseconds, by part", fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(PARTS))
    _tidy(axes, "x")


def _draw_points(axes, measured: Sequence[Result], name: str, label: str, backends: Sequence[str]) -> None:
    known = [result for result in measured if getattr(result, name) is not None]
    for backend in dict.fromkeys(result.row.backend for result in known):
        points = sorted((getattr(r, name), r.median * 1e3) for r in known if r.row.backend == backend)
        colour = COLOURS[backends.index(backend) % len(COLOURS)]
        axes.plot(*zip(*points), "o-", color=colour, label=backend, markersize=4)
    if not known:
        axes.set_axis_off()
        return
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label, fontsize=8)
    axes.set_ylabel("median, milliseconds", fontsize=8)
    axes.legend(fontsize=6, frameon=False)
    _tidy(axes, "both")


def _tidy(axes, grid: str) -> None:
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def write_reports(results: Sequence[Result], machine: dict, settings: dict, output: Path) -> list[Path]:
    """Writes `output`.json, .md and, with matplotlib and a time to show, .png: all or none; returns their paths."""
    drawable = importlib.util.find_spec("matplotlib") and any(result.status == MEASURED for result in results)
    paths = [output.with_name(output.name + ending) for ending in (".json", ".md", *([".png"] if drawable else []))]
    with ExitStack() as stack:
        data, text, *picture = (stack.enter_context(replaced_when_done(path)) for path in paths)
        data.write_text(json.dumps(as_dict(results, machine, settings), indent=2, allow_nan=False) + "\n")
        text.write_text(as_markdown(results, machine))
        if picture:
            draw(results, machine, picture[0])
    return paths
