"""Latency, throughput, memory and power of detectors, whole and by part: contenders, tables and charts."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from .. import __version__
from ..artifact import Store
from ..ops import native
from . import harness, report, timing
from .contender import Detector
from .harness import Result, Settings
from .parts import PARTS
from .plan import Cache, Spec, sources_digest
from .sensors import find_sensors

SCHEMA = 2
PACKAGES = (
    "litedetr-deploy", "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "onnx", "onnxscript", "numpy",
)  # fmt: skip
HOW = (
    "Milliseconds; 'ratio' is to the first of the table; MiB is the most that was resident in the process, or the "
    "memory that it took of the GPU; 'error' is the largest difference from PyTorch in float32 given the same choice "
    "of queries, as a share of what is allowed. The parts are medians of other calls, which were watched. How it is "
    "measured: docs/benchmarks.md."
)


class Run:
    """A plan that is measured, and its reports: at `output` without suffix, beside which lies what is finished, from
    which the same run resumes.  unchecked: time artifacts of unknown weights, that nothing can be compared with."""

    def __init__(self, plan: Sequence[Spec], cache: Cache, settings: Settings, output: Path | None = None,
                 unchecked: bool = False):  # fmt: skip
        self.machine = timing.machine(PACKAGES) | {"sources": f"{__version__}-{sources_digest()}"}
        with contextlib.suppress(RuntimeError):
            self.machine["op_kernel"] = native.load_core().kda_cpu_isa().decode()
        if sensors := find_sensors():
            self.machine |= sensors.describe()
        self.results: list[Result] = []
        self._plan, self._cache, self._settings = plan, cache, settings
        self._output, self._unchecked = output, unchecked
        same = ("cpu", "cores", "python", "packages", "sources", "op_kernel", "device", "driver", "power_mode")
        identity = {name: self.machine.get(name) for name in same} | {"seconds": settings.seconds, "schema": SCHEMA}
        self._store = Store(output and output.with_name(output.name + ".unfinished.jsonl"), identity)

    def measure(self, progress: Callable[[str], None] = lambda stage: None) -> list[Result]:
        """Measure the plan.  A KeyboardInterrupt says what is kept."""
        store, self._cache.progress = self._store, progress
        if store.resumed:
            progress(f"resume: {store.resumed} finished in {store.path}")
        for (_, _, device, _), group in groupby(self._plan, lambda spec: spec.group):
            contenders = [Detector(spec, self._cache, self._unchecked) for spec in group]
            sensors = find_sensors()
            sensors = sensors if sensors and device in sensors.devices else None
            try:
                harness.measure(contenders, self._settings, progress, sensors, store, self.results)
            except KeyboardInterrupt:
                if not (store.path and store.items):
                    raise
                kept = f"{len(store.items)} finished are kept in {store.path}: the same command resumes"
                raise KeyboardInterrupt(kept) from None
        return self.results

    def to_dict(self) -> dict:
        cache = self._cache
        given = {"variant": cache.chosen_variant, "unchecked": self._unchecked, "checkpoint": cache.checkpoint}
        return as_dict(self.results, self.machine, asdict(self._settings) | given)

    def write(self) -> list[Path]:
        """Write the reports, if there is an output, and forget what was kept to resume; return their paths."""
        paths = write_reports(self.results, self.machine, self.to_dict(), self._output) if self._output else []
        self._store.remove()
        return paths


# Reports


def to_dict(result: Result) -> dict:
    """Return JSON types; times in milliseconds, memory in MiB."""

    def milliseconds(seconds: dict[str, float] | None) -> dict[str, float] | None:
        return seconds and {name: value * 1e3 for name, value in seconds.items()}

    def mib(size: int | None) -> float | None:
        return None if size is None else round(size * 2**-20, 1)

    row = {"contender": result.name, **asdict(result.subject), "status": result.status, "trouble": result.trouble}
    if result.seconds:
        row |= result.milliseconds() | {
            "images_per_second": result.subject.batch / result.median,
            "device_median_ms": timing.percentile(result.device_seconds, 50) * 1e3 if result.device_seconds else None,
            "peak_memory_mib": mib(result.memory_bytes),
            "device_memory_mib": mib(result.device_memory_bytes),
            "parts_ms": milliseconds(result.parts),
            "encoder_operators_ms": milliseconds(result.encoder_operators),
            "encoder_ms": (milliseconds(result.parts) or {}).get("encoder"),
            "power": result.power,
        }
    return row | result.figures | {"seconds": result.seconds}


def as_dict(results: Sequence[Result], machine: dict, settings: dict) -> dict:
    rows = list(map(to_dict, results))
    return {"benchmark": "latency", "schema": SCHEMA, "machine": machine, "settings": settings, "results": rows}


def groups(results: Sequence[Result]) -> list[list[Result]]:
    return [list(group) for _, group in groupby(results, lambda result: result.subject.group)]


def as_markdown(results: Sequence[Result], machine: dict) -> list[str]:
    lines = ["# Latency of detectors", "", report.machine_text(machine), "", HOW, *tables(results)]
    models = {f"{r.subject.model}, {r.subject.image_size[0]}x{r.subject.image_size[1]}": r.figures
              for r in results if r.seconds and r.figures.get("gflops")}  # fmt: skip
    rows = [[name, known["gflops"], known["ap"]] for name, known in models.items()]
    about = "GFLOPs of one image as the paper counts (multiply-adds); AP as published for the trained weights."
    return [*lines, "", "## Models", "", about, *report.table(("model", "GFLOPs", "AP"), rows)] if rows else lines


def tables(results: Sequence[Result]) -> list[str]:
    """Return the lines of all tables, under a heading for each group of what is compared."""
    return [line for group in groups(results) for line in ("", f"## {group[0].subject.where}", *_tables(group))]


def _tables(group: Sequence[Result]) -> list[str]:
    """Return the lines of all tables of a group; each has the contenders that it is about."""
    timed = [to_dict(result) for result in group if result.seconds]
    columns = ("contender", "median", "p90", "p99", "calls", "images/s", "ratio", "encoder", "MiB", "error")
    cells = [[
        row["contender"], row["median_ms"], row["p90_ms"], row["p99_ms"], str(row["calls"]), row["images_per_second"],
        f"{row['median_ms'] / timed[0]['median_ms']:.2f}", row["encoder_ms"],
        row["device_memory_mib"] or row["peak_memory_mib"],
        "none" if row.get("worst") is None else f"{row['worst']:.1%}",
    ] for row in timed]  # fmt: skip
    lines = report.table(columns, cells + [[result.name, result.remark] for result in group if not result.seconds])

    def add(title: str, columns: Sequence[str], about: str, numbers: Callable[[dict], Sequence]) -> None:
        cells = [[row["contender"], *numbers(row)] for row in timed if row.get(about)]
        if cells:
            lines.extend(["", title, *report.table(("contender", *columns), cells)])

    parts = [part for part in PARTS if any(part in (row["parts_ms"] or ()) for row in timed)]
    add("By part, ms:", parts, "parts_ms", lambda row: [row["parts_ms"].get(part) for part in parts])

    most: Counter[str] = Counter()
    encoders = [row["encoder_operators_ms"] or {} for row in timed]
    for encoder in encoders:
        most |= Counter(encoder)
    least = max((sum(encoder.values()) for encoder in encoders), default=0) / 100
    names = [name for name, milliseconds in most.most_common() if milliseconds >= least]

    def operators(row: dict) -> list:
        rest = dict(row["encoder_operators_ms"])
        return [*[rest.pop(name, None) for name in names], sum(rest.values())]

    add("The encoder by operator, ms:", [*names, "the rest"], "encoder_operators_ms", operators)

    def power(row: dict) -> list:
        names = ("watts", "joules_per_image", "clock_mhz", "lowest_clock_mhz", "temperature_c")
        return [*(row["power"][name] for name in names), ", ".join(row["power"]["throttling"]) or "no"]

    headings = ("watts", "J/image", "MHz", "lowest MHz", "°C", "throttling")
    add("Power, while called without a pause:", headings, "power", power)
    both = ("median_ms", "trtexec_ms")
    add("Against trtexec, median ms:", ("here", "trtexec"), "trtexec_ms", lambda row: [row[name] for name in both])
    return lines


def write_reports(results: Sequence[Result], machine: dict, contents: dict, output: Path) -> list[Path]:
    """Write `output`.json, .md and, with matplotlib and a time to show, .png; return their paths."""
    chart = functools.partial(draw, results, machine) if any(result.seconds for result in results) else None
    return report.write(output, contents, as_markdown(results, machine), chart)


def draw(results: Sequence[Result], machine: dict, path: Path) -> None:
    """Save a PNG with a row of panels for every group: bars by part, latency against GFLOPs, latency against AP."""
    from matplotlib.figure import Figure

    drawn = [timed for group in groups(results) if (timed := [result for result in group if result.seconds])]
    height = max(3.6, 1.9 + 0.34 * max(map(len, drawn)))
    backends = list(dict.fromkeys(result.subject.backend for group in drawn for result in group))
    colours = {backend: report.COLOURS[i % len(report.COLOURS)] for i, backend in enumerate(backends)}

    def points(axes, group: Sequence[Result], name: str, label: str) -> None:
        known = [result for result in group if result.figures.get(name) is not None]
        if not known:
            axes.set_axis_off()
            return
        for backend in dict.fromkeys(result.subject.backend for result in known):
            places = sorted((r.figures[name], r.median * 1e3) for r in known if r.subject.backend == backend)
            axes.plot(*zip(*places), "o-", color=colours[backend], label=backend, markersize=4)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label, fontsize=8)
        axes.set_ylabel("median, milliseconds", fontsize=8)
        axes.legend(fontsize=6, frameon=False)
        report.tidy(axes, "both")

    figure = Figure(figsize=(17, len(drawn) * height), layout="constrained")
    panels = figure.subplots(len(drawn), 3, squeeze=False, width_ratios=(2, 1, 1))
    for (bars, flops, ap), group in zip(panels, drawn):
        # The watched calls took another time than the median one: their shares are shown.
        stacks = [
            {part: seconds * result.median * 1e3 / sum(parts.values()) for part, seconds in parts.items()}
            for result in group for parts in [result.parts or {"whole": result.median}]
        ]  # fmt: skip
        report.draw_bars(bars, [result.name for result in group], stacks, dict(zip(PARTS, report.COLOURS)))
        bars.set_title(group[0].subject.where, fontsize=10)
        bars.set_xlabel("median, milliseconds, by part", fontsize=8)
        bars.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(PARTS))
        points(flops, group, "gflops", "GFLOPs of one image")
        points(ap, group, "ap", "AP, published")
    figure.suptitle(f"Latency of detectors: {machine.get('device') or machine['cpu']}, {machine['date'][:10]}", size=11)
    figure.savefig(path, format="png", dpi=130)
