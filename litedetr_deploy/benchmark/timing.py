"""Timing that all benchmarks share: fair repetitions, medians and percentiles, and a description of the machine.

PyTorch and numpy are imported where they are used: a machine with a GPU may have no numpy.
"""

from __future__ import annotations

import datetime
import functools
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import LiteDetrError
from ..machine import describe_cpu, installed_version, usable_cores

# Seconds of rest before a timed call.  The threads of the library that ran before keep spinning in wait for more work
# (milliseconds in ONNX Runtime, some 20 ms in GNU OpenMP) and would take the processor from the one that is timed.
REST = 0.03
FEWEST, MOST = 3, 1000  # repetitions, whatever the time allows
DEFAULT_CACHE_BYTES = 64 << 20  # where the system does not tell, or the CUDA device
WAIT = 1_000_000  # cycles that a GPU waits for the host before a timed call, some 0.5 ms; more where that is too short
LONGEST_WAIT = 1_000_000_000


def time_call(call: Callable[[], object], cold: bool = False, warm: bool = True) -> float:
    """Return the seconds of one call that the threads of others do not disturb.

    cold: with the caches full of something else.  warm: right after an untimed call, as in a model, where what an
    operator reads has just been computed.
    """
    time.sleep(REST)
    if cold:
        evict_caches()
    elif warm:
        call()
    start = time.perf_counter()
    output = call()  # kept, so that freeing it is not timed
    seconds = time.perf_counter() - start
    del output
    return seconds


def time_device_call(call: Callable[[], object], cold: bool = False) -> float:
    """Return the seconds that one call keeps the CUDA device busy, between two events; warm, or with a cold L2 cache.

    The device waits before it, until the host has handed over the whole call: else the host's time would be measured.

    Raises RuntimeError where the call itself waits for the device.
    """
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wait = WAIT
    while wait <= LONGEST_WAIT:
        if cold:
            evict_caches("cuda")
        else:
            call()
        torch.cuda._sleep(wait)
        begin.record()
        output = call()
        end.record()
        overtaken = begin.query()
        end.synchronize()
        del output
        if not overtaken:
            return begin.elapsed_time(end) / 1e3
        wait *= 4
    raise RuntimeError("the call waits for the device, so that its time between two events is not the device's alone")


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Return the call as a CUDA graph: a replay costs the host the same whatever the call is made of."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what the first calls load and compile cannot be captured
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay():
        graph.replay()
        return output

    return replay


def repetitions(time_once: Callable[[], object], budget: float) -> int:
    """Return how many timed calls fit into `budget` seconds, by one try, with all that `time_once` does around them."""
    start = time.perf_counter()
    time_once()
    return max(FEWEST, min(MOST, int(budget / (time.perf_counter() - start))))


def interleave(counts: dict) -> list:
    """Return every name as often as it counts, spread evenly: equal counts make a round-robin, and of unequal ones each
    reaches any fraction of its calls when the others do."""
    turns = [((turn + 0.5) / count, name) for name, count in counts.items() for turn in range(count)]
    return [name for _, name in sorted(turns, key=lambda turn: turn[0])]


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear between the two samples around the rank percent / 100 * (n - 1), counted from 0; 50 is the median."""
    ordered = sorted(samples)
    rank = percent / 100 * (len(ordered) - 1)
    below, above = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    return below + (above - below) * (rank - math.floor(rank))


def evict_caches(device: str = "cpu") -> None:
    """Reads and writes more memory than the device's caches hold.  Plain stores of one value could bypass them."""
    buffer = _cache_sized_buffer(device)
    buffer += 1


@functools.cache
def _cache_sized_buffer(device: str = "cpu"):
    if device == "cpu":
        import numpy as np

        return np.zeros(cache_bytes() // 8, np.int64)
    import torch

    return torch.zeros(2 * device_cache_bytes() // 4, dtype=torch.int32, device=device)


def cache_bytes() -> int:
    """The caches that one core of this machine can fill, all levels together."""
    units = {"K": 1 << 10, "M": 1 << 20}
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [re.fullmatch(r"(\d+)([KM])", file.read_text().strip()) for file in files]
    return sum(int(size[1]) * units[size[2]] for size in sizes if size) or DEFAULT_CACHE_BYTES


def device_cache_bytes() -> int:
    """The L2 cache of the CUDA device."""
    import torch

    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or DEFAULT_CACHE_BYTES


def device() -> dict:
    """What a reader needs to know about the CUDA device, as JSON types, with the bandwidths of copies on it: within a
    half of its L2 cache, and of much more than that cache holds."""
    import torch

    def bandwidth(size: int, copies: int) -> float:
        """10^9 bytes a second, read and written, launches included."""
        source = torch.zeros(size // 4, device="cuda")
        target = torch.empty_like(source)

        def copy():  # by a kernel: copy_ may leave it to the copy engine
            for _ in range(copies):
                torch.neg(source, out=target)

        seconds = percentile([time_device_call(copy) for _ in range(20)], 50)
        return round(2 * source.nbytes * copies / seconds / 1e9, 1)

    properties, cache = torch.cuda.get_device_properties(0), device_cache_bytes()
    large = max(4 * cache, min(1 << 30, torch.cuda.mem_get_info()[0] // 8))
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / (1 << 30), 1),
        "l2_mib": round(cache / (1 << 20), 1),
        "cuda": torch.version.cuda,
        "l2_gigabytes_per_second": bandwidth(cache // 4, 20),
        "memory_gigabytes_per_second": bandwidth(large, 1),
    }


def memory_bytes() -> int:
    """The whole memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def whole_numbers(text: str, option: str) -> list[int]:
    """Return the numbers in a comma-separated list, each once; raise LiteDetrError where one is none, or below 1."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise LiteDetrError(f"{option} is {text!r}; it must be whole numbers of 1 or more, as in 1,2.")
    return list(dict.fromkeys(map(int, parts)))


def check_threads(counts: Iterable[int]) -> None:
    """Raise LiteDetrError for a number of threads that this machine has no cores for: each takes memory of its own."""
    cores = usable_cores()
    if bad := [count for count in counts if not 1 <= count <= cores]:
        raise LiteDetrError(f"--threads is {bad[0]}; this machine has {cores} cores: give 1 to that many.")


def machine(packages: Sequence[str]) -> dict:
    """What a reader needs to know about the machine, as JSON types; `packages` are the distributions to name."""
    cpu, flags = describe_cpu()
    return {
        "cpu": cpu,
        "cpu_features": [flag for flag in flags if re.match(r"avx|amx|fma|f16c|asimd|sve|i8mm|bf16", flag)],
        "cores": usable_cores(),
        "cache_mib": round(cache_bytes() / (1 << 20), 1),
        "memory_gib": round(memory_bytes() / (1 << 30), 1),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {package: version for package in packages if (version := installed_version(package))},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
