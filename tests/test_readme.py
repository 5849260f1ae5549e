"""What README.md and docs/ tell a reader to type: it runs, its options exist, and its links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from litedetr_deploy import cli

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
PAGES = [
    README,
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "CHANGELOG.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
LEFT_OUT = "..."  # stands for any lines in what a command prints


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def console(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the commands of a page's `console` blocks, and the lines that each is said to print."""
    for block in blocks(page, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *printed = part.splitlines()
            yield command, [line for line in printed if line != LEFT_OUT]


def loosely(line: str) -> str:
    """A line without its numbers, spaces and remarks in brackets: times, sizes and the worst figure differ between
    machines."""
    return " ".join(re.sub(r"\([^)]*\)", "()", re.sub(r"[\d.,]*\d", "#", line)).split())


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with what the README's commands read, and this Python's commands in the PATH."""
    (tmp_path / "docs").symlink_to(REPOSITORY / "docs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.mark.slow
def test_the_readme_runs_as_written(clone):
    commands = list(console(README))
    assert len(commands) == 3 and all(printed for _, printed in commands)
    for command, expected in commands:
        done = subprocess.run(command, shell=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout
        lines = iter(done.stdout.splitlines())
        printed = map(loosely, lines)
        for line in expected:
            assert loosely(line) in printed, f"$ {command}\ndoes not print, in this order:\n{line}\nbut:\n{done.stdout}"
    assert (clone / "found.png").is_file()
    for code in blocks(README, "python"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0 and "heart" in done.stdout, done.stderr


def commands_of(page: Path) -> Iterator[list[str]]:
    """Yield every `litedetr` command of a page's blocks, as a shell splits it."""
    for block in [*blocks(page, "bash"), *blocks(page, "console")]:
        for line in block.splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and words[0] == "litedetr":
                yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page):
    for words in commands_of(page):
        command = typer.main.get_command(cli.app)
        while hasattr(command, "commands"):
            assert words[0] in command.commands, f"{page.name}: no command {words[0]}"
            command, words = command.commands[words[0]], words[1:]
        known = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
        unknown = {word for word in words if re.match(r"--?[a-z]", word)} - known
        assert not unknown, f"{page.name}: {command.name} has no option {unknown}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    targets = re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^)make ([a-z0-9-]+)", page.read_text(), re.MULTILINE)) <= set(targets)
