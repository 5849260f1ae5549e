"""The order of the rooms: who may import whom, read from the source, so that no import hides in a function."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "litedetr_deploy"

# From the bottom up.  A room imports from rooms on lower floors, never from its own floor or from above; where two
# rooms need each other, a callable is passed in.
FLOORS = (
    {"errors"},
    {"files", "machine"},
    {"artifact", "assets"},
    {"ops"},
    {"model", "runtime"},
    {"verify"},
    {"export", "evaluate"},
    {"fuse", "engine", "benchmark", "serve"},
    {PACKAGE},  # the package itself, whose names lead to every room below
    {"cli"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

MODULES = sorted((REPOSITORY / PACKAGE).rglob("*.py"))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def imports(file: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line, module, name) of every import in a file, wherever it stands; the name is '' for a whole module."""
    package = file.relative_to(REPOSITORY).with_suffix("").parts[:-1]
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def room_of_import(module: str, name: str) -> str | None:
    """The room that an import reaches, None outside this package."""
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return None
    return parts[1] if len(parts) > 1 else name if name in FLOOR_OF else PACKAGE


def room_of_file(file: Path) -> str:
    first = file.relative_to(REPOSITORY / PACKAGE).parts[0]
    return PACKAGE if first == "__init__.py" else first.removesuffix(".py")


def place(file: Path, line: int) -> str:
    return f"{file.relative_to(REPOSITORY)}:{line}"


def test_every_room_has_a_floor():
    assert {room_of_file(file) for file in MODULES} <= set(FLOOR_OF)


def test_imports_go_downhill():
    uphill = []
    for file in MODULES:
        room = room_of_file(file)
        for line, module, name in imports(file):
            reached = room_of_import(module, name)
            if reached in (None, room) or (reached == PACKAGE and name == "__version__"):
                continue
            if FLOOR_OF[reached] >= FLOOR_OF[room]:
                uphill.append(f"{place(file, line)}: {room} imports {reached}")
    assert not uphill, "\n".join(uphill)


def test_the_package_itself_imports_no_room_eagerly():
    eager = [node for node in parse(REPOSITORY / PACKAGE / "__init__.py").body if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in eager if node.level] == []


def test_runtime_needs_no_torch():
    wrong = [
        place(file, line)
        for file in (REPOSITORY / PACKAGE / "runtime").rglob("*.py")
        for line, module, _ in imports(file)
        if module.split(".")[0] == "torch"
    ]
    assert not wrong, wrong


def test_importing_the_package_needs_numpy_alone():
    code = f"import sys; before = set(sys.modules); import {PACKAGE}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    third_party = {name.split(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)
    assert PACKAGE in third_party <= {PACKAGE, "numpy"}


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "tests", "tools"])
def test_outside_the_package_private_names_are_not_imported(folder):
    wrong = []
    for file in sorted((REPOSITORY / folder).rglob("*.py")):
        for line, module, name in imports(file):
            # The tests are laid out like the package: they may import a private module, whose names its room shares.
            private = name if folder == "tests" else f"{module}.{name}"
            if room_of_import(module, name) and re.search(r"(^|\.)_[a-z]", private):
                wrong.append(f"{place(file, line)}: {module}.{name}")
    assert not wrong, "\n".join(wrong)


def test_the_arithmetic_includes_no_framework():
    wrong = []
    for file in sorted((REPOSITORY / "plugins" / "kda").iterdir()):
        if file.suffix in {".h", ".cpp", ".cu", ".cuh"}:
            found = re.findall(
                r"#include\s*[<\"](\S*(?:torch|ATen|NvInfer|onnxruntime|openvino)\S*)[>\"]", file.read_text()
            )
            wrong += [f"{file.name}: {header}" for header in found]
    assert not wrong, wrong
