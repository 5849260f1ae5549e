"""Timing that all benchmarks share: fair repetitions, medians and percentiles, and a description of the machine.

A benchmark warms its contenders up, asks `repetitions` how often each fits into its share of the time, and runs
`time_call` on them in the order of `interleave`, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import math
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

# Seconds of rest before a timed call.  The threads of the library that ran before keep spinning in wait for more work
# (milliseconds in ONNX Runtime, some 20 ms in GNU OpenMP) and would take the processor from the one that is timed.
REST = 0.03
FEWEST, MOST = 3, 1000  # repetitions, whatever the time allows
DEFAULT_CACHE_BYTES = 64 << 20  # where the system does not tell


def time_call(call: Callable[[], object], cold: bool = False) -> float:
    """Seconds of one call that the threads of others do not disturb.

    Warm: right after an untimed call, as in a model, where what the operator reads has just been computed.  Cold: with
    the caches full of something else.
    """
    time.sleep(REST)
    if cold:
        evict_caches()
    else:
        call()
    start = time.perf_counter()
    output = call()  # kept, so that freeing it is not timed
    seconds = time.perf_counter() - start
    del output
    return seconds


def repetitions(call: Callable[[], object], budget: float, cold: bool = False) -> int:
    """How many timed calls fit into `budget` seconds, rest included, by the time that one takes now."""
    start = time.perf_counter()
    time_call(call, cold)
    return max(FEWEST, min(MOST, int(budget / (time.perf_counter() - start))))


def interleave(counts: dict[str, int]) -> list[str]:
    """Every name as often as it counts, spread evenly: equal counts make a round-robin, and of unequal ones each
    reaches any fraction of its calls when the others do."""
    turns = [((turn + 0.5) / count, name) for name, count in counts.items() for turn in range(count)]
    return [name for _, name in sorted(turns, key=lambda turn: turn[0])]


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear between the two samples around the rank percent / 100 * (n - 1), counted from 0; 50 is the median."""
    ordered = sorted(samples)
    rank = percent / 100 * (len(ordered) - 1)
    below, above = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    return below + (above - below) * (rank - math.floor(rank))


def evict_caches() -> None:
    """Reads and writes more memory than the caches hold.  Plain stores of one value could bypass them."""
    buffer = _cache_sized_buffer()
    np.add(buffer, 1, out=buffer)


@functools.cache
def _cache_sized_buffer() -> np.ndarray:
    return np.zeros(cache_bytes() // 8, np.int64)


def cache_bytes() -> int:
    """The caches that one core of this machine can fill, all levels together."""
    units = {"K": 1 << 10, "M": 1 << 20}
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [re.fullmatch(r"(\d+)([KM])", file.read_text().strip()) for file in files]
    return sum(int(size[1]) * units[size[2]] for size in sizes if size) or DEFAULT_CACHE_BYTES


def machine(packages: Sequence[str]) -> dict:
    """What a reader needs to know about the machine, as JSON types; `packages` are the distributions to name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()  # x86-64, aarch64
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_features": [flag for flag in flags if re.match(r"avx|amx|fma|f16c|asimd|sve|i8mm|bf16", flag)],
        "cores": cores,
        "cache_mib": round(cache_bytes() / (1 << 20), 1),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {package: version for package in packages if (version := _version(package))},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
