"""tools/jetson_check.sh without a Jetson: what it would run, and what it does when a step fails."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

NEEDS_DEVICE = False  # conftest.py
SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "jetson_check.sh"


def check(tmp_path: Path, *arguments) -> subprocess.CompletedProcess:
    """Run it where `bin`, if a test has made one, comes before everything else."""
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TRTEXEC": "trtexec"}
    command = list(map(str, (SCRIPT, *arguments)))
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)


def commands(shown: str) -> dict[str, list[str]]:
    found = (line.removeprefix("== ").partition(": ") for line in shown.splitlines() if line.startswith("== "))
    return {name: shlex.split(command) for name, _, command in found}


def test_bash_reads_it():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, SCRIPT], check=True)


def test_dry_run_prints_every_command_and_runs_none(tmp_path):
    done = check(tmp_path, "--dry-run", "--output", tmp_path / "output")
    assert done.returncode == 0 and not done.stderr, done.stderr
    found = commands(done.stdout)
    steps = [
        "system",
        "doctor",
        "configure",
        "plugin",
        "kernels",
        "plugin-harness",
        "export",
        "trtexec",
        "build",
        "verify",
        "latency",
    ]
    assert list(found) == steps
    assert done.stdout.count("not run\n") == 2 * len(steps)  # as it goes, and in the table
    assert "DRY RUN: these commands were printed; none was run, and nothing was measured." in done.stdout
    assert not list(tmp_path.iterdir())
    assert "--checkpoint" in found["latency"]


@pytest.mark.parametrize("weights, option", [((), "--unchecked"), (("--checkpoint", "model.pth"), "--checkpoint")])
def test_a_given_model_is_not_exported(tmp_path, weights, option):
    done = check(tmp_path, "--dry-run", "--onnx", "model.onnx", *weights)
    found = commands(done.stdout)
    assert "export" not in found and "export: skipped" in done.stdout
    assert found["build"][2] == found["verify"][3] == str(tmp_path / "model.onnx")
    assert option in found["latency"]


def test_litedetr_takes_these_options(tmp_path):
    from typer.main import get_command

    from litedetr_deploy import cli

    for name, words in commands(check(tmp_path, "--dry-run").stdout).items():
        if words[0] == "litedetr":
            command, rest = get_command(cli.app), words[1:]
            while hasattr(command, "commands"):
                command, rest = command.commands[rest[0]], rest[1:]
            command.make_context(name, rest, resilient_parsing=False)


def test_a_failing_step_stops_only_what_needs_it(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in {"cmake": "exit 3", "litedetr": 'echo "litedetr $1" && [ "$1" != build ]'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    done = check(tmp_path, "--output", tmp_path / "output")
    assert done.returncode == 1, done.stdout
    table = done.stdout.rpartition("\n\n")[2]
    found = {line.split()[0]: line.split(" s  ", 1)[1] for line in table.splitlines() if " s  " in line}
    assert found["configure"] == "failed: exit status 3, see configure.log"
    assert found["plugin"] == "skipped: it needs configure"
    assert found["export"] == found["doctor"] == "passed"
    assert found["trtexec"] == found["build"] == found["kernels"] == "skipped: it needs plugin"
    assert found["latency"] == found["verify"] == "skipped: it needs build"
    assert (tmp_path / "output" / "export.log").read_text() == "litedetr export\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tea"], "there is no option --tea"),
        (["--onnx"], "--onnx needs a value"),
        (["--onnx", "absent.onnx"], "which is no file"),
        (["--image-size", "800"], "--image-size is 800"),
    ],
)
def test_wrong_use_exits_with_2(tmp_path, arguments, message):
    done = check(tmp_path, *arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr
