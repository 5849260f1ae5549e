"""The one harness of all benchmarks: contenders are opened, checked, and called in turns, so that a machine that slows
down slows all of them alike.  Imports neither numpy nor PyTorch."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..artifact import Store
from ..errors import LiteDetrError
from . import sensors as power
from . import timing
from .parts import Watched

MEASURED, WRONG, FAILED, MISSING, INTERRUPTED = "measured", "wrong", "failed", "missing", "interrupted"
SHORT = 0.3  # seconds: a shorter call is preceded by an untimed one, so that caches and clock are as in steady use
MOST_WATCHED = 20  # calls from whose medians the parts are taken
WATCHED_TURNS = 3  # that these calls come in: a machine changes its pace, the ratios of parts should not
POWER_SECONDS = 4.0  # of calls without a pause, while the sensors are read


@dataclass
class Result:
    """What came of a contender."""

    name: str
    subject: Any = None  # what was measured, as the contender says it
    status: str = INTERRUPTED
    trouble: str = ""  # why it is not MEASURED
    seconds: list[float] = field(default_factory=list)  # of every timed call, in their order
    cold_seconds: list[float] = field(default_factory=list)  # of calls with the caches full of something else
    device_seconds: list[float] = field(default_factory=list)  # of the timed calls, how long a CUDA device worked
    memory_bytes: int | None = None  # resident in its process at most
    device_memory_bytes: int | None = None
    parts: dict[str, float] | None = None  # seconds, of calls that were watched
    encoder_operators: dict[str, float] | None = None  # seconds, of the same calls
    power: dict | None = None  # see sensors.watch
    figures: dict = field(default_factory=dict)  # JSON types that the contender adds

    @property
    def remark(self) -> str:
        """What stands in place of a time."""
        return f"{self.status}: {self.trouble}" if self.trouble else self.status

    @property
    def median(self) -> float:
        """Seconds; NaN without a timed call."""
        return timing.percentile(self.seconds, 50) if self.seconds else math.nan

    def milliseconds(self) -> dict:
        """Return median and percentiles by their names in the reports."""
        names = {"median_ms": 50, "p90_ms": 90, "p99_ms": 99}
        found = {name: timing.percentile(self.seconds, percent) * 1e3 for name, percent in names.items()}
        for name in ("median_ms", "p90_ms") if self.cold_seconds else ():
            found[f"cold_{name}"] = timing.percentile(self.cold_seconds, names[name]) * 1e3
        return {"calls": len(self.seconds)} | found


class Contender:
    """One thing to time: `open`, then `check`, then calls, then `close`.

    name: tells it from those that it is compared with; key: from all others of a run that is resumed.
    """

    name = key = ""
    subject: Any = None  # what the report says about it
    images = 1  # a call
    _last = math.inf  # seconds of the last call

    def missing(self) -> str:
        """Return why this machine cannot run it; empty where it can."""
        return ""

    def open(self) -> None:
        """Make it ready to be called."""

    def call(self):
        """Run it once and wait for its outputs, which are returned."""
        raise NotImplementedError

    def check(self, result: Result) -> str:
        """Return what is wrong with its outputs; empty where they are right.  May add figures to `result`."""
        return ""

    def time(self, cold: bool = False) -> tuple[float, float | None]:
        """Return the seconds of one call, and of those how many a CUDA device worked on it, where that can be told."""
        self._last = timing.time_call(self.call, cold, warm=self._last < SHORT)
        return self._last, None

    def memory(self) -> int | None:
        """Return the bytes that were resident in its process at most, if the process is its own."""

    def parts(self, calls: int) -> Watched | None:
        """Return the medians of the parts of so many calls; None where they cannot be told."""

    def keep_running(self, seconds: float) -> tuple[int, float]:
        """Call it without a pause for so long; return how many images it took, and the seconds."""
        start, calls = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds or not calls:
            self.call()
            calls += 1
        return calls * self.images, elapsed

    def finish(self, result: Result) -> None:
        """Add to the figures what needs no other contender."""

    def close(self) -> None:
        """Free what it holds; harmless when it is closed already."""


@dataclass(frozen=True)
class Settings:
    seconds: float = 20.0  # of timed calls for each, of cold ones as many again; a slow one takes what a few calls need
    at_once: int = 4  # contenders that are open together and called in turns
    cold: bool = False


def measure(
    contenders: Sequence[Contender], settings: Settings, progress: Callable[[str], None] = lambda stage: None,
    sensors=None, store: Store | None = None, results: list[Result] | None = None,
) -> list[Result]:  # fmt: skip
    """Measure contenders that are compared with each other; return a `Result` for each, in their order.

    sensors: see `sensors.find_sensors`; read while each contender runs on its own.
    store: keeps what is finished, by the contenders' keys, and already holds what need not be measured again.
    results: gets the results at once, before they are filled: an interruption leaves there what is done.
    """
    found = {contender: Result(contender.name, contender.subject) for contender in contenders}
    if results is not None:
        results += found.values()
    for contender, result in found.items():
        if store and contender.key in store.items:
            vars(result).update(store.items[contender.key])
        elif reason := contender.missing():
            result.status, result.trouble = MISSING, reason
    waiting = [contender for contender in contenders if found[contender].status == INTERRUPTED]
    for start in range(0, len(waiting), settings.at_once):
        together = {contender: found[contender] for contender in waiting[start : start + settings.at_once]}
        try:
            _measure_together(together, settings, progress, sensors)
        finally:
            for contender in together:
                contender.close()
        for contender, result in together.items():
            if store and result.status in (MEASURED, WRONG):
                kept = {name: value for name, value in vars(result).items() if name not in ("name", "subject")}
                store.add(contender.key, kept)
    return list(found.values())


def _measure_together(results: dict[Contender, Result], settings: Settings, progress, sensors) -> None:
    def each(stage: str) -> Iterator[tuple[Contender, Result]]:
        """The contenders that are neither wrong nor failed; what fails in the loop's body is its trouble alone."""
        for contender, result in results.items():
            if result.status == INTERRUPTED:
                progress(f"{contender.name}: {stage}")
                yield contender, result

    for contender, result in each("load and check"):
        with _troubles(result):
            used = sensors.memory_used() if sensors else None
            contender.open()
            if used is not None:
                result.device_memory_bytes = sensors.memory_used() - used
            if wrong := contender.check(result):
                result.status, result.trouble = WRONG, wrong
                contender.close()

    counts = {}
    for contender, result in each("first timed call"):
        with _troubles(result):
            for cold in (False, True)[: 1 + settings.cold]:
                time_once = functools.partial(contender.time, cold)
                counts[contender, cold] = timing.repetitions(time_once, settings.seconds)
    turns = timing.interleave(counts)
    if turns:
        progress(f"{len(turns)} calls in turns")
    for contender, cold in turns:
        result = results[contender]
        if result.status == INTERRUPTED:
            with _troubles(result):
                seconds, device_seconds = contender.time(cold)
                (result.cold_seconds if cold else result.seconds).append(seconds)
                if device_seconds is not None:
                    result.device_seconds.append(device_seconds)
                result.memory_bytes = contender.memory()  # without what the parts' own sessions take

    watched: dict[Contender, list] = {contender: [] for contender in results}
    for turn in range(WATCHED_TURNS):
        for contender, result in each(f"parts, turn {turn + 1} of {WATCHED_TURNS}"):
            with _troubles(result):
                calls = math.ceil(min(MOST_WATCHED, len(result.seconds)) / WATCHED_TURNS)
                watched[contender].append(contender.parts(calls))
    for contender, result in each("power" if sensors else "finish"):
        with _troubles(result):
            if None not in watched[contender]:
                vars(result).update(vars(Watched.median(watched[contender])))
            if sensors:
                result.power = power.watch(sensors, functools.partial(contender.keep_running, POWER_SECONDS))
            contender.finish(result)
            result.status = MEASURED


@contextlib.contextmanager
def _troubles(result: Result) -> Iterator[None]:
    """Turn what fails, in any of half a dozen libraries that share no base class, into the result's trouble."""
    try:
        yield
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        known = isinstance(error, LiteDetrError) and line
        result.status, result.trouble = FAILED, line if known else f"{type(error).__name__}: {line}"
        result.seconds.clear()
