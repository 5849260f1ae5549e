"""Latency, throughput, memory and power of detectors, whole and by part.

`measure` goes through a plan in small groups.  All of a group are loaded, each in a process of its own, checked
against PyTorch, and timed in turns, so that a machine that slows down slows all of them alike.  What is finished is
kept in a file, from which the same command goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from .. import __version__
from ..errors import LiteDetrError
from ..files import replaced_when_done
from ..model.paper import ROWS
from ..ops import native
from ..runtime.tensorrt import read_record
from ..verify.reference import Reference, Weights, make_picture, make_reference
from . import timing
from .contender import Job, Worker, WorkerFailed
from .parts import Watched
from .plan import Cache, Row, artifact_metadata, sources_digest, why_missing
from .sensors import find_sensors, watch

SCHEMA = 1
PACKAGES = (
    "litedetr-deploy", "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "onnx", "onnxscript", "numpy",
)  # fmt: skip
MEASURED, WRONG, FAILED, MISSING = "measured", "wrong", "failed", "missing"
MOST_WATCHED = 20  # calls from whose medians the parts are taken
WATCHED_TURNS = 3  # that these calls come in: a machine changes its pace, the ratios of parts should not
POWER_SECONDS = 4.0  # of calls without a pause, while the sensors are read

PUBLISHED_AP = {row.variant: row.ap for row in ROWS}  # of the published weights, on COCO val2017


@dataclass
class Result:
    """What came of a row."""

    row: Row
    status: str = FAILED  # MEASURED, WRONG, FAILED or MISSING
    trouble: str = ""  # why it is not MEASURED
    seconds: list[float] = field(default_factory=list)  # of every timed call, in their order
    device_seconds: list[float] = field(default_factory=list)  # of those, how long a CUDA device worked
    memory_bytes: int | None = None  # resident in its process at most
    device_memory_bytes: int | None = None
    parts: dict[str, float] | None = None  # seconds, of calls that were watched
    encoder_operators: dict[str, float] | None = None  # seconds, of the same calls
    power: dict | None = None  # see sensors.watch
    check: list[dict] | None = None  # see check.Check; None: not checked
    variant: str | None = None
    gflops: float | None = None  # 1e9 multiply-adds an image, as the paper counts
    ap: float | None = None  # published, of this variant's trained weights
    trtexec_ms: float | None = None  # trtexec's own median

    @property
    def median(self) -> float:
        """Seconds."""
        return timing.percentile(self.seconds, 50)

    def to_dict(self) -> dict:
        """JSON types; times in milliseconds, memory in MiB."""

        def scaled(value, factor, digits):
            return None if value is None else round(value * factor, digits)

        figures = {}
        if self.seconds:
            figures = {
                "calls": len(self.seconds),
                "median_ms": self.median * 1e3,
                "p90_ms": timing.percentile(self.seconds, 90) * 1e3,
                "p99_ms": timing.percentile(self.seconds, 99) * 1e3,
                "images_per_second": self.row.batch / self.median,
                "device_median_ms": timing.percentile(self.device_seconds, 50) * 1e3 if self.device_seconds else None,
                "peak_memory_mib": scaled(self.memory_bytes, 2**-20, 1),
                "device_memory_mib": scaled(self.device_memory_bytes, 2**-20, 1),
                "parts_ms": self.parts and {part: seconds * 1e3 for part, seconds in self.parts.items()},
                "encoder_operators_ms": self.encoder_operators
                and {name: seconds * 1e3 for name, seconds in self.encoder_operators.items()},
                "encoder_ms": scaled((self.parts or {}).get("encoder"), 1e3, 6),
                "power": self.power,
                "trtexec_ms": self.trtexec_ms,
            }
        rest = {name: getattr(self, name) for name in ("check", "variant", "gflops", "ap", "seconds")}
        return {**self.row.to_dict(), "status": self.status, "trouble": self.trouble, **figures, **rest}


@dataclass
class Settings:
    """seconds: for each row, of timed calls; at_once: how many are loaded and timed in turns.

    variant: of a checkpoint that cannot tell; unchecked: time artifacts of unknown weights, that nothing can be
    compared with.
    """

    seconds: float = 20.0
    at_once: int = 4
    variant: str | None = None
    unchecked: bool = False


def describe_machine() -> dict:
    """What a reader needs to know about this machine, as JSON types."""
    machine = timing.machine(PACKAGES)
    machine["sources"] = f"{__version__}-{sources_digest()}"
    with contextlib.suppress(RuntimeError):
        machine["op_kernel"] = native.load_core().kda_cpu_isa().decode()
    if sensors := find_sensors():
        machine |= sensors.describe()
    return machine


def fingerprint(machine: dict, settings: Settings) -> dict:
    """What must be the same for finished rows to stand beside new ones."""
    same = ("cpu", "cores", "python", "packages", "sources", "op_kernel", "device", "driver", "power_mode")
    return {name: machine.get(name) for name in same} | {"seconds": settings.seconds, "schema": SCHEMA}


class Kept:
    """The finished results of an unfinished run, in a file beside the output; without an output they are not kept."""

    def __init__(self, output: Path | None, identity: dict):
        self.path = output and output.with_name(output.name + ".unfinished.json")
        self._identity, self._results = identity, {}
        if self.path and self.path.is_file():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a file of another version or a damaged one
                contents = json.loads(self.path.read_text())
                if contents["identity"] == json.loads(json.dumps(identity)):
                    self._results = contents["results"]

    def __len__(self) -> int:
        return len(self._results)

    def get(self, row: Row) -> Result | None:
        fields = self._results.get(row.key)
        return Result(row, **fields) if fields else None

    def add(self, result: Result) -> None:
        fields = dataclasses.asdict(result)
        del fields["row"]
        self._results[result.row.key] = fields
        if self.path:
            with replaced_when_done(self.path) as temporary:
                temporary.write_text(json.dumps({"identity": self._identity, "results": self._results}) + "\n")

    def remove(self) -> None:
        if self.path:
            self.path.unlink(missing_ok=True)


def measure(
    plan: Sequence[Row],
    cache: Cache,
    settings: Settings,
    kept: Kept,
    results: list[Result],
    progress: Callable[[str], None] = lambda stage: None,
) -> None:
    """Appends a `Result` for every row, finished ones first in every group: an interruption leaves what is done."""
    prepared = Preparation(cache, settings, progress)
    for _, group in groupby(plan, lambda row: row.group):
        waiting = []
        for row in group:
            if done := kept.get(row):
                results.append(done)
            elif reason := why_missing(row, cache, settings.unchecked):
                results.append(Result(row, MISSING, reason))
            else:
                waiting.append(row)
        for start in range(0, len(waiting), settings.at_once):
            for result in _measure_together(waiting[start : start + settings.at_once], prepared, settings, progress):
                results.append(result)
                if result.status in (MEASURED, WRONG):
                    kept.add(result)
    order = {row: place for place, row in enumerate(plan)}
    results.sort(key=lambda result: order[result.row])


def _measure_together(
    rows: Sequence[Row], prepared: Preparation, settings: Settings, progress: Callable[[str], None]
) -> list[Result]:
    sensors = find_sensors()
    if sensors and rows[0].device not in sensors.devices:
        sensors = None
    results = [Result(row) for row in rows]
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for result in results:
            with _troubles(result):
                worker = _load(result, prepared, sensors, stack, progress)
                if worker:
                    workers[result.row.key] = worker
        by_key = {result.row.key: result for result in results if result.row.key in workers}
        _time_in_turns(by_key, workers, settings.seconds, progress)
        for key, result in by_key.items():
            with _troubles(result):
                result.memory_bytes = workers[key].memory()  # before the parts' own sessions
        _watch_in_turns(by_key, workers, progress)
        for key, result in by_key.items():
            with _troubles(result):
                worker = workers[key]
                if sensors:
                    progress(f"{result.row.contender}: power")
                    result.power = watch(sensors, lambda worker=worker: worker.keep_running(POWER_SECONDS))
                if result.row.way.engine == "tensorrt":
                    result.trtexec_ms = trtexec_median(prepared.model(result.row), result.row)
                result.status = MEASURED
    return results


@contextlib.contextmanager
def _troubles(result: Result) -> Iterator[None]:
    """What fails is a line of the report; the others go on."""
    try:
        yield
    except (WorkerFailed, LiteDetrError, RuntimeError, ValueError) as error:
        result.status = FAILED
        line = str(error).strip().partition("\n")[0]
        known = isinstance(error, (WorkerFailed, LiteDetrError))
        result.trouble = line if known and line else f"{type(error).__name__}: {line}"


def _load(result: Result, prepared: Preparation, sensors, stack, progress) -> Worker | None:
    """The running contender, found right; None, and the reason in `result`, where it is wrong."""
    row = result.row
    reference = prepared.reference(row)
    job = prepared.job(row)
    result.variant, result.gflops = prepared.variant(row), reference.gflops
    if not row.is_artifact:  # which may have been trained on anything
        result.ap = PUBLISHED_AP.get(result.variant)
    used = sensors.memory_used() if sensors else None
    progress(f"{row.contender}: load")
    worker = stack.enter_context(Worker(job))
    worker.ready()
    if used is not None:
        result.device_memory_bytes = sensors.memory_used() - used
    if not reference.checks:
        return worker
    progress(f"{row.contender}: check against PyTorch")
    check = reference.check(worker.outputs(), row.precision)
    result.check = check.rows
    if check.passed:
        return worker
    worst = check.worst
    result.status = WRONG
    difference, tolerance = f"{worst['difference']:.1e}", f"{worst['tolerance']:.1e}"
    result.trouble = f"its {worst['quantity']} differ from PyTorch's by {difference}, and {tolerance} is allowed"
    worker.close()
    return None


def _time_in_turns(
    results: dict[str, Result], workers: dict[str, Worker], budget: float, progress: Callable[[str], None]
) -> None:
    counts = {}
    for key, result in results.items():
        progress(f"{result.row.contender}: first timed call")
        with _troubles(result):
            counts[key] = timing.repetitions(workers[key].time, budget)
    order = timing.interleave(counts)
    progress(f"{len(order)} calls in turns")
    for key in order:
        result = results[key]
        if result.trouble:
            continue
        with _troubles(result):
            seconds, device_seconds = workers[key].time()
            result.seconds.append(seconds)
            if device_seconds is not None:
                result.device_seconds.append(device_seconds)
    _drop_failed(results)


def _watch_in_turns(results: dict[str, Result], workers: dict[str, Worker], progress: Callable[[str], None]) -> None:
    watched = {key: [] for key in results}
    for turn in range(WATCHED_TURNS):
        for key, result in results.items():
            if result.trouble:
                continue
            progress(f"{result.row.contender}: parts, turn {turn + 1} of {WATCHED_TURNS}")
            with _troubles(result):
                calls = math.ceil(min(MOST_WATCHED, len(result.seconds)) / WATCHED_TURNS)
                watched[key].append(workers[key].parts(calls))
    _drop_failed(results)
    for key, result in results.items():
        if None not in watched[key]:
            middle = Watched.median(watched[key])
            result.parts, result.encoder_operators = middle.parts, middle.encoder_operators


def _drop_failed(results: dict[str, Result]) -> None:
    """Nothing more is asked of a contender that failed."""
    for key in [key for key, result in results.items() if result.trouble]:
        del results[key]


class Preparation:
    """Exported models and PyTorch's outputs, made when they are needed and kept in the cache."""

    def __init__(self, cache: Cache, settings: Settings, progress: Callable[[str], None] = lambda stage: None):
        self._cache, self._settings, self._progress = cache, settings, progress
        self._weights: dict[str, Weights] = {}
        self._references: dict[Path, Reference] = {}

    def prepare(self, row: Row) -> None:
        """Everything that measuring a row needs."""
        self.reference(row)
        if row.way.engine != "pytorch":
            self._graph(row)

    def job(self, row: Row) -> Job:
        weights = self.weights(row) if row.way.engine == "pytorch" else None
        # A copy: the process gets a name to load, not this process's tensors.
        weights = weights and dataclasses.replace(weights)
        return Job(row, self.model(row), self.reference(row).path, weights)

    def variant(self, row: Row) -> str | None:
        """The name of its detector; None for a checkpoint, and where an artifact does not tell."""
        with contextlib.suppress(LiteDetrError):
            if row.is_artifact:
                return artifact_metadata(Path(row.model)).get("variant")
            if self.weights(row).random:
                from ..model.config import parse_variant

                return parse_variant(row.model).name
        return None

    def weights(self, row: Row) -> Weights | None:
        source = self._cache.weights(row)
        if source is None:
            return None
        if source not in self._weights:
            known = self.variant(row) if row.is_artifact else None
            self._weights[source] = Weights(source, self._settings.variant or known)
        return self._weights[source]

    def reference(self, row: Row) -> Reference:
        path, weights = self._cache.reference(row), self.weights(row)
        reference = self._references.get(path)
        if reference is None and path.is_file():
            reference = Reference(path, weights if importlib.util.find_spec("torch") else None)
        there = reference.precisions if reference else ()
        if row.precision not in there:
            path.parent.mkdir(parents=True, exist_ok=True)
            if weights is None:
                return make_picture(path, row.image_size)
            self._progress(f"{row.model}: PyTorch's outputs at {row.image_size[0]}x{row.image_size[1]}")
            reference = make_reference(path, weights, row.image_size, dict.fromkeys((*there, "fp32", row.precision)))
        self._references[path] = reference
        return reference

    def model(self, row: Row) -> Path:
        """The artifact; exported, and built, where it is not there yet.  PyTorch reads none."""
        path = self._cache.model(row)
        if row.way.engine == "pytorch" or path.is_file():
            return path
        graph = self._graph(row)
        if path != graph:
            from .. import build_engine

            self._progress(f"{row.model}: build the engine")
            build_engine(graph, path, batch=[row.batch] * 3, verify=False)
        return path

    def _graph(self, row: Row) -> Path:
        path = self._cache.graph(row)
        if path.is_file():
            return path
        from ..export.export import export_onnx

        path.parent.mkdir(parents=True, exist_ok=True)
        self._progress(f"{row.model}: export, attention {row.way.attention}, {row.precision}")
        # Not verified here: what is timed is checked before, in the engine that is timed.
        export_onnx(
            self.weights(row).model, path, row.way.attention, row.precision, row.image_size, outputs="raw", verify=False
        )
        return path


def trtexec_command(plan: Path, row: Row) -> list[str]:
    height, width = row.image_size
    command = ["trtexec", f"--loadEngine={plan}", f"--shapes=images:{row.batch}x3x{height}x{width}"]
    command += ["--useCudaGraph", "--warmUp=1000", "--duration=5"]
    if row.way.attention == "op" and not read_record(plan).get("plugin_inside"):
        command.append(f"--dynamicPlugins={native.library('tensorrt')}")
    return command


def trtexec_median(plan: Path, row: Row) -> float | None:
    """Milliseconds: the median latency that NVIDIA's own tool measures; None where it is not there or fails."""
    if shutil.which("trtexec") is None:
        return None
    try:
        done = subprocess.run(trtexec_command(plan, row), capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return read_trtexec(done.stdout)


def read_trtexec(text: str) -> float | None:
    found = re.search(r"\] Latency: .*?\bmedian = ([\d.]+) ms", text)
    return float(found[1]) if found else None
