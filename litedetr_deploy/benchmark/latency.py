"""Latency, throughput, memory and power of detectors, whole and by part: contenders, tables and charts.

What is compared is loaded together, each in a process of its own, checked against PyTorch, and timed in turns.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from .. import __version__
from ..artifact import Store
from ..model.paper import PUBLISHED
from ..ops import native
from ..runtime.tensorrt import read_record
from . import harness, report, timing
from .cache import Cache, sources_digest
from .contender import Worker
from .harness import Result, Settings
from .parts import PARTS
from .plan import Spec, why_missing
from .report import three_digits
from .sensors import find_sensors

SCHEMA = 2
PACKAGES = (
    "litedetr-deploy", "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "onnx", "onnxscript", "numpy",
)  # fmt: skip
PUBLISHED_AP = {model.variant: model.ap for model in PUBLISHED}  # of the published weights, on COCO val2017
HOW = (
    "Every contender runs in a process of its own; those of a table are loaded together and called in turns, each "
    "short call right after an untimed one of its own. Before it is timed, a contender's output on one image is "
    "compared with PyTorch's in float32 given the same choice of queries; 'error' is its largest difference as a "
    "share of what is allowed. Times are in milliseconds, 'ratio' is to the first of the table, and MiB is the most "
    "that was resident in the process, or the memory that it took of the GPU. The parts are medians of other calls, "
    "in turns again, watched by ONNX Runtime's profile or by hooks in PyTorch; positions, which an exported graph has "
    "as constants, are among 'other' in PyTorch. Batch norms are folded in all of them."
)


class Detector(harness.Contender):
    """A detector in a process of its own."""

    def __init__(self, spec: Spec, cache: Cache, unchecked: bool = False):
        self.subject, self.name, self.key, self.images = spec, spec.name, spec.key, spec.batch
        self._cache, self._unchecked = cache, unchecked
        self._worker: Worker | None = None

    def missing(self) -> str:
        return why_missing(self.subject, self._cache, self._unchecked)

    def open(self) -> None:
        self._worker = Worker(self._cache.job(self.subject))

    def check(self, result: Result) -> str:
        spec, reference = self.subject, self._cache.reference(self.subject)
        variant = self._cache.variant(spec)
        ap = None if spec.is_artifact else PUBLISHED_AP.get(variant)  # an artifact may have been trained on anything
        result.figures |= {"variant": variant, "gflops": reference.gflops, "ap": ap, "check": None, "trtexec_ms": None}
        if not reference.checks:
            return ""
        verdict = reference.check(self._worker.ask("outputs"), spec.precision)
        share = verdict.worst.share if verdict.passed else None
        result.figures |= {"check": [row.to_dict() for row in verdict.rows], "worst": share}
        return "" if verdict.passed else f"it does not agree with {verdict.against}: {verdict.why}"

    def time(self, cold: bool = False) -> tuple[float, float | None]:
        return self._worker.ask("time", cold)

    def memory(self) -> int | None:
        return self._worker.ask("memory")

    def parts(self, calls: int):
        return self._worker.ask("parts", calls)

    def keep_running(self, seconds: float) -> tuple[int, float]:
        return self._worker.ask("keep_running", seconds)

    def finish(self, result: Result) -> None:
        if self.subject.way.engine == "tensorrt":
            result.figures["trtexec_ms"] = trtexec_median(self._cache.model(self.subject), self.subject)

    def close(self) -> None:
        if self._worker:
            self._worker.close()
        self._worker = None


class Run:
    """A plan that is measured, and its reports.

    output: the reports' path without suffix; beside it lies what is finished, from which the same run resumes.
    unchecked: time artifacts of unknown weights, that nothing can be compared with.
    """

    def __init__(self, plan: Sequence[Spec], cache: Cache, settings: Settings, output: Path | None = None,
                 unchecked: bool = False):  # fmt: skip
        self.machine, self.results = describe_machine(), []
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

    @property
    def failed(self) -> bool:
        return any(result.status in (harness.WRONG, harness.FAILED) for result in self.results)

    @property
    def nothing(self) -> bool:
        """Whether all contenders are missing on this machine."""
        return all(result.status == harness.MISSING for result in self.results)

    def to_dict(self) -> dict:
        cache = self._cache
        given = {"variant": cache.chosen_variant, "unchecked": self._unchecked, "checkpoint": cache.checkpoint}
        return as_dict(self.results, self.machine, asdict(self._settings) | given)

    def write(self) -> list[Path]:
        """Write the reports, if there is an output, and forget what was kept to resume; return their paths."""
        paths = write_reports(self.results, self.machine, self.to_dict(), self._output) if self._output else []
        self._store.remove()
        return paths


def describe_machine() -> dict:
    """Return what a reader needs to know about this machine, as JSON types."""
    machine = timing.machine(PACKAGES) | {"sources": f"{__version__}-{sources_digest()}"}
    with contextlib.suppress(RuntimeError):
        machine["op_kernel"] = native.load_core().kda_cpu_isa().decode()
    if sensors := find_sensors():
        machine |= sensors.describe()
    return machine


def trtexec_command(plan: Path, spec: Spec) -> list[str]:
    command = ["trtexec", f"--loadEngine={plan}", f"--shapes=images:{spec.shape.replace('x', 'x3x', 1)}"]
    command += ["--useCudaGraph", "--warmUp=1000", "--duration=5"]
    if spec.way.attention == "op" and not read_record(plan).get("plugin_inside"):
        command.append(f"--dynamicPlugins={native.library('tensorrt')}")
    return command


def trtexec_median(plan: Path, spec: Spec) -> float | None:
    """Return the median latency, in milliseconds, that NVIDIA's own tool measures; None where it is absent or fails."""
    if shutil.which("trtexec") is None:
        return None
    try:
        done = subprocess.run(trtexec_command(plan, spec), capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return read_trtexec(done.stdout)


def read_trtexec(text: str) -> float | None:
    found = re.search(r"\] Latency: .*?\bmedian = ([\d.]+) ms", text)
    return float(found[1]) if found else None


# Reports


def to_dict(result: Result) -> dict:
    """Return JSON types; times in milliseconds, memory in MiB."""

    def scaled(value, factor, digits):
        return None if value is None else round(value * factor, digits)

    def milliseconds(parts):
        return parts and {name: seconds * 1e3 for name, seconds in parts.items()}

    figures = {}
    if result.seconds:
        figures = result.milliseconds() | {
            "images_per_second": result.subject.batch / result.median,
            "device_median_ms": timing.percentile(result.device_seconds, 50) * 1e3 if result.device_seconds else None,
            "peak_memory_mib": scaled(result.memory_bytes, 2**-20, 1),
            "device_memory_mib": scaled(result.device_memory_bytes, 2**-20, 1),
            "parts_ms": milliseconds(result.parts),
            "encoder_operators_ms": milliseconds(result.encoder_operators),
            "encoder_ms": scaled((result.parts or {}).get("encoder"), 1e3, 6),
            "power": result.power,
        }
    what = {**result.subject.to_dict(), "status": result.status, "trouble": result.trouble}
    return {**what, **figures, **result.figures, "seconds": result.seconds}


def as_dict(results: Sequence[Result], machine: dict, settings: dict) -> dict:
    rows = [to_dict(result) for result in results]
    return {"benchmark": "latency", "schema": SCHEMA, "machine": machine, "settings": settings, "results": rows}


def groups(results: Sequence[Result]) -> list[list[Result]]:
    return [list(group) for _, group in groupby(results, lambda result: result.subject.group)]


def group_title(group: Sequence[Result]) -> str:
    spec = group[0].subject
    return f"{spec.image_size[0]}x{spec.image_size[1]}, batch {spec.batch}, {spec.where}"


def _milliseconds(seconds: float | None) -> str:
    return three_digits(seconds and seconds * 1e3)


def as_markdown(results: Sequence[Result], machine: dict) -> list[str]:
    lines = ["# Latency of detectors", "", report.machine_text(machine), "", HOW, *tables(results)]
    models = {f"{r.subject.model}, {r.subject.image_size[0]}x{r.subject.image_size[1]}": r.figures
              for r in results if r.seconds and r.figures.get("gflops")}  # fmt: skip
    if models:
        rows = [[name, three_digits(known["gflops"]), three_digits(known["ap"])] for name, known in models.items()]
        lines += ["", "## Models", "", "GFLOPs of one image as the paper counts (multiply-adds); AP as published for "
                  "the trained weights.", *report.table(("model", "GFLOPs", "AP"), rows)]  # fmt: skip
    return lines


def tables(results: Sequence[Result]) -> list[str]:
    """Return the lines of all tables, under a heading for each group of what is compared."""
    return [line for group in groups(results) for line in ("", f"## {group_title(group)}", *_tables(group))]


def _tables(group: Sequence[Result]) -> list[str]:
    """Return the lines of all tables of a group; each has the contenders that it is about."""
    timed = [result for result in group if result.seconds]
    columns = ("contender", "median", "p90", "p99", "calls", "images/s", "ratio", "encoder", "MiB", "error")
    lines = report.table(columns, [_row(result, timed) for result in group])

    def add(title: str, columns: Sequence[str], about: Sequence[Result], cells: Callable[[Result], list[str]]) -> None:
        if about:
            rows = [[result.name, *cells(result)] for result in about]
            lines.extend(["", title, *report.table(("contender", *columns), rows)])

    watched = [result for result in timed if result.parts]
    parts = [part for part in PARTS if any(part in result.parts for result in watched)]
    add("By part, ms:", parts, watched, lambda result: [_milliseconds(result.parts.get(part)) for part in parts])

    encoders = [result for result in timed if result.encoder_operators]
    most: Counter[str] = Counter()
    for result in encoders:
        most |= Counter(result.encoder_operators)
    least = max((sum(result.encoder_operators.values()) for result in encoders), default=0) / 100
    names = [name for name, seconds in most.most_common() if seconds >= least]

    def operators(result: Result) -> list[str]:
        shown = [result.encoder_operators.get(name) for name in names]
        rest = sum(result.encoder_operators.values()) - sum(seconds or 0.0 for seconds in shown)
        return [_milliseconds(seconds) for seconds in (*shown, max(0.0, rest))]

    add("The encoder by operator, ms:", [*names, "the rest"], encoders, operators)

    figures = ("watts", "joules_per_image", "clock_mhz", "lowest_clock_mhz", "temperature_c")
    add("Power, while called without a pause:", ("watts", "J/image", "MHz", "lowest MHz", "°C", "throttling"),
        [result for result in timed if result.power],
        lambda result: [*(three_digits(result.power[name]) for name in figures),
                        ", ".join(result.power["throttling"]) or "no"])  # fmt: skip
    add("Against trtexec, median ms:", ("here", "trtexec"),
        [result for result in timed if result.figures.get("trtexec_ms") is not None],
        lambda result: [_milliseconds(result.median), three_digits(result.figures["trtexec_ms"])])  # fmt: skip
    return lines


def _row(result: Result, timed: Sequence[Result]) -> list[str]:
    if not result.seconds:
        return [result.name, f"{result.status}{result.trouble and ': '}{result.trouble}"]
    figures, memory = to_dict(result), result.device_memory_bytes or result.memory_bytes
    share = result.figures.get("worst")
    return [
        result.name,
        *(three_digits(figures[name]) for name in ("median_ms", "p90_ms", "p99_ms")),
        str(figures["calls"]),
        three_digits(figures["images_per_second"]),
        f"{result.median / timed[0].median:.2f}",
        three_digits(figures["encoder_ms"]),
        "-" if memory is None else f"{memory / 2**20:.0f}",
        "none" if share is None else f"{share:.1%}",
    ]


def write_reports(results: Sequence[Result], machine: dict, contents: dict, output: Path) -> list[Path]:
    """Write `output`.json, .md and, with matplotlib and a time to show, .png; return their paths."""
    chart = functools.partial(draw, results, machine) if any(result.seconds for result in results) else None
    return report.write(output, contents, as_markdown(results, machine), chart)


def draw(results: Sequence[Result], machine: dict, path: Path) -> None:
    """Save a PNG with a row of panels for every group: bars by part, latency against GFLOPs, latency against AP."""
    from matplotlib.figure import Figure

    drawn = [timed for group in groups(results) if (timed := [result for result in group if result.seconds])]
    longest = max(map(len, drawn))  # its bars set the height of all
    figure = Figure(figsize=(17, len(drawn) * max(3.6, 1.9 + 0.34 * longest)), layout="constrained")
    panels = figure.subplots(len(drawn), 3, squeeze=False, width_ratios=(2, 1, 1))
    backends = list(dict.fromkeys(result.subject.backend for group in drawn for result in group))
    for (bars, flops, ap), group in zip(panels, drawn):
        # The watched calls took another time than the median one: their shares are shown.
        stacks = [
            {part: seconds * result.median * 1e3 / sum(parts.values()) for part, seconds in parts.items()}
            for result in group for parts in [result.parts or {"whole": result.median}]
        ]  # fmt: skip
        report.draw_bars(bars, [result.name for result in group], stacks, dict(zip(PARTS, report.COLOURS)))
        bars.set_title(group_title(group), fontsize=10)
        bars.set_xlabel("median, milliseconds, by part", fontsize=8)
        bars.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(PARTS))
        _draw_points(flops, group, "gflops", "GFLOPs of one image", backends)
        _draw_points(ap, group, "ap", "AP, published", backends)
    figure.suptitle(
        f"Latency of detectors: {machine.get('device') or machine['cpu']}, {machine['date'][:10]}", fontsize=11
    )
    figure.savefig(path, format="png", dpi=130)


def _draw_points(axes, timed: Sequence[Result], name: str, label: str, backends: Sequence[str]) -> None:
    known = [result for result in timed if result.figures.get(name) is not None]
    if not known:
        axes.set_axis_off()
        return
    for backend in dict.fromkeys(result.subject.backend for result in known):
        points = sorted((r.figures[name], r.median * 1e3) for r in known if r.subject.backend == backend)
        colour = report.COLOURS[backends.index(backend) % len(report.COLOURS)]
        axes.plot(*zip(*points), "o-", color=colour, label=backend, markersize=4)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label, fontsize=8)
    axes.set_ylabel("median, milliseconds", fontsize=8)
    axes.legend(fontsize=6, frameon=False)
    report.tidy(axes, "both")
