"""Versions of TensorRT that are known to build wrong engines of these detectors, and the gate that says why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import LiteDetrError

TEGRA_RELEASE = Path("/etc/nv_tegra_release")
# The major release of Jetson Linux -> the JetPack that has it.
JETPACKS = {36: 6, 38: 7, 39: 7}


@dataclass(frozen=True)
class Target:
    """What is about to be built."""

    backend: str
    version: tuple[int, ...]  # of the backend
    precision: str
    operators: frozenset[str]  # op types of the graph
    compute_capabilities: tuple[str, ...] = ()
    jetpack: int | None = None  # None: not a Jetson


@dataclass(frozen=True)
class KnownBad:
    """One row of the table: where all that is given holds."""

    why: str
    fix: str
    source: str
    backends: tuple[str, ...] = ("tensorrt",)
    since: tuple[int, ...] = ()  # the first version
    before: tuple[int, ...] = (99,)  # the first version that is good again
    jetpack: int | None = None
    compute_capability: str | None = None
    precisions: tuple[str, ...] = ()
    operator: str | None = None
    refused: bool = True  # else it is only warned about

    def holds(self, target: Target) -> bool:
        return (
            target.backend in self.backends
            and self.since <= target.version < self.before
            and self.jetpack in (None, target.jetpack)
            and (self.compute_capability is None or self.compute_capability in target.compute_capabilities)
            and (not self.precisions or target.precision in self.precisions)
            and (self.operator is None or self.operator in target.operators)
        )


TABLE = (
    KnownBad(
        "the attention plugins need the interfaces of TensorRT 10.3",
        "Install TensorRT 10.7 or newer", "TensorRT's release notes", before=(10, 3),
    ),
    KnownBad(
        "this TensorRT is newer than what litedetr-deploy knows",
        "Install TensorRT 10.3 to 11.x, or a newer litedetr-deploy", "tested range", since=(12,),
    ),
    KnownBad(
        "TensorRT builds deformable attention made of GridSample nodes wrong, silently: boxes are off by hundreds of "
        "pixels, and equal images of one batch get different ones", "Export with --attention op or gather",
        "NVIDIA/TensorRT issue 4813, seen in 10.14 to 11.1 on sm_86, 89 and 120, open",
        since=(10, 14), operator="GridSample",
    ),
    KnownBad(
        "TensorRT-RTX shares the compiler of TensorRT, which builds deformable attention made of GridSample nodes "
        "wrong, silently", "Export with --attention gather", "NVIDIA/TensorRT issue 4813",
        backends=("tensorrt-rtx",), operator="GridSample",
    ),
    KnownBad(
        "the TensorRT that JetPack 6 came with first builds wrong engines of transformer detectors",
        "Install TensorRT 10.7, which runs on JetPack 6 as well", "reports of DETR deployments on Jetson",
        before=(10, 7), jetpack=6,
    ),
    KnownBad(
        "TensorRT 11 does not support JetPack 6",
        "Stay with TensorRT 10.x, or upgrade to JetPack 7.2.2 and TensorRT 11.4.1",
        "TensorRT 11.4.1, migration guide for Jetson", since=(11,), jetpack=6,
    ),
    KnownBad(
        "TensorRT before 10.15 builds engines on JetPack 7 whose boxes are wrong",
        "Install TensorRT 10.15 or newer", "ultralytics issue 22873", before=(10, 15), jetpack=7,
    ),
    KnownBad(
        "TensorRT 11.0 to 11.4.0 does not support JetPack",
        "Install TensorRT 10.15 to 10.x, or 11.4.1 on JetPack 7.2.2 or newer",
        "TensorRT 11.4.1, migration guide for Jetson", since=(11,), before=(11, 4, 1), jetpack=7,
    ),
    KnownBad(
        "TensorRT before 10.15 builds wrong engines for Thor",
        "Install TensorRT 10.15 or newer", "ultralytics issue 22873", before=(10, 15), compute_capability="11.0",
    ),
    KnownBad(
        "fused multi-head attention in half precision gives wrong results on sm_120; these graphs keep its softmax in "
        "FP32, which parts the fusion, so the comparison after the build decides",
        "If it fails, export with --precision fp32", "NVIDIA/TensorRT issue 4837, seen up to 10.16.1, open",
        backends=("tensorrt", "tensorrt-rtx"), compute_capability="12.0", precisions=("fp16", "bf16", "int8"),
        refused=False,
    ),
)  # fmt: skip


def gate(target: Target, allow_known_bad: bool = False) -> list[str]:
    """Return what is known against building for `target`, as sentences.

    Raises LiteDetrError for what is refused, unless that is allowed.
    """
    rows = [row for row in TABLE if row.holds(target)]
    version = ".".join(map(str, target.version))
    for row in rows:
        if row.refused and not allow_known_bad:
            raise LiteDetrError(
                f"{target.backend} {version} must not be used for this: {row.why} ({row.source}). "
                f"{row.fix}; or take the risk with --allow-known-bad."
            )
    return [f"{target.backend} {version}: {row.why} ({row.source}). {row.fix}." for row in rows]


def find_jetpack() -> int | None:
    """Return the major version of JetPack on this machine, None where it is no Jetson or an unknown one."""
    try:
        release = re.match(r"# R(\d+)", TEGRA_RELEASE.read_text())
    except OSError:
        return None
    return JETPACKS.get(int(release[1])) if release else None
