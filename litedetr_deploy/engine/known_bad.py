"""The gate before a build: versions of TensorRT that known_bad.toml lists are refused, or warned about, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import LiteDetrError
from ..files import tomllib
from .api import version_numbers

TABLE = Path(__file__).with_suffix(".toml")
TEGRA_RELEASE = Path("/etc/nv_tegra_release")
JETPACKS = {36: 6, 38: 7, 39: 7}  # the major release of Jetson Linux -> the JetPack that has it


@dataclass(frozen=True)
class Target:
    """What is about to be built."""

    backend: str
    version: tuple[int, ...]  # of the backend
    precision: str
    operators: frozenset[str]  # op types of the graph
    compute_capabilities: tuple[str, ...] = ()
    jetpack: int | None = None  # None: not a Jetson


def gate(target: Target, allow_known_bad: bool = False) -> list[str]:
    """Return what is known against building for `target`, as sentences; raise LiteDetrError for what is not allowed."""
    rows = [row for row in tomllib.loads(TABLE.read_text())["row"] if _holds(row, target)]
    version = ".".join(map(str, target.version))
    for row in rows:
        if row.get("refused", True) and not allow_known_bad:
            raise LiteDetrError(
                f"{target.backend} {version} must not be used for this: {row['why']} ({row['source']}). {row['fix']}; "
                "or take the risk with --allow-known-bad."
            )
    return [f"{target.backend} {version}: {row['why']} ({row['source']}). {row['fix']}." for row in rows]


def _holds(row: dict, target: Target) -> bool:
    return (
        target.backend in row.get("backends", ["tensorrt"])
        and version_numbers(row.get("since", "0")) <= target.version < version_numbers(row.get("before", "99"))
        and row.get("jetpack") in (None, target.jetpack)
        and row.get("compute_capability") in (None, *target.compute_capabilities)
        and row.get("operator") in (None, *target.operators)
        and target.precision in row.get("precisions", [target.precision])
    )


def find_jetpack() -> int | None:
    """Return the major version of JetPack on this machine, None where it is no Jetson or an unknown one."""
    try:
        release = re.match(r"# R(\d+)", TEGRA_RELEASE.read_text())
    except OSError:
        return None
    return JETPACKS.get(int(release[1])) if release else None
