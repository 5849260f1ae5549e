"""What this machine gives to a process."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import warnings
from pathlib import Path

from .errors import LiteDetrError, Notice


def usable_cores() -> int:
    """Return how many logical cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_cpu() -> tuple[str, list[str]]:
    """Return the name of the processor and of its features, as Linux has them; none where it is another."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, fields.get("flags", fields.get("Features", "")).split()  # x86-64, aarch64


def computes_bfloat16() -> bool:
    """Return whether the processor has instructions for products in bfloat16: AVX512_BF16, AMX or ARM's."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(describe_cpu()[1])


@functools.cache  # every session asks, and Linux takes its time to list many cores
def has_vnni() -> bool:
    """Return whether the processor sums products of INT8 in 32 bits: AVX512-VNNI or AVX-VNNI.  False where Linux does
    not say so."""
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(describe_cpu()[1])


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def bounded_threads(threads: int | None) -> int | None:
    """Return `threads`, or with a `Notice` the usable cores: more wait for each other, and each takes memory.

    None, which leaves the choice to a library, stays None.
    """
    if threads is None:
        return None
    if threads < 1:
        raise LiteDetrError(f"threads is {threads}; it must be 1 or more. Leave it out for one a core.")
    most = usable_cores()
    if threads > most:
        warnings.warn(f"{threads} threads are asked for, and there are {most} cores: {most} are used", Notice, 3)
    return min(threads, most)
