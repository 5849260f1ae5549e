"""Build, check and time the CUDA kernels on a machine with a GPU, nvcc, cmake and torch; nothing is installed.

    python tools/gpu_check.py [--results FOLDER] [--build FOLDER] [--deformable-detr FOLDER] [--skip-timing]

Steps: build for this GPU; C++ tests; compute-sanitizer (memcheck, racecheck, initcheck); tests/gpu; times
(benchmarks/kernels.py, with the kernel of a checkout of Deformable DETR where one is given).
A step that fails is reported and the others go on where they can.  Writes summary.md, the times as JSON and Markdown,
and every step's whole output into a folder named after the device and the date.  Exits with 1 where a step failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SANITIZER_ROUNDS = "30"  # of the driver's sweep; compute-sanitizer makes it many times slower
TAIL_LINES = 15


@dataclass
class Step:
    name: str
    status: str  # 'passed', 'failed' or 'skipped'
    seconds: float = 0.0
    detail: str = ""  # why, or the end of the output


class Run:
    """Runs steps one after another and keeps what came of them."""

    def __init__(self, results: Path):
        self.results = results
        self.steps: list[Step] = []
        results.mkdir(parents=True, exist_ok=True)

    def command(self, name: str, command: Sequence[object], timeout: float = 1800, **environment: str) -> bool:
        """True if it exits with 0; its output goes to `name`.log."""
        command = [str(part) for part in command]
        print(f"== {name}: {' '.join(command)}", flush=True)
        start = time.monotonic()
        try:
            done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | environment, timeout=timeout, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")  # fmt: skip
            output, passed = done.stdout, done.returncode == 0
        except subprocess.TimeoutExpired as error:
            output, passed = f"{_text(error.stdout)}\nstopped after {timeout:.0f} seconds", False
        except OSError as error:
            output, passed = str(error), False
        (self.results / f"{name}.log").write_text(" ".join(command) + "\n\n" + output)
        tail = "\n".join(output.strip().splitlines()[-TAIL_LINES:])
        self._add(Step(name, "passed" if passed else "failed", time.monotonic() - start, tail))
        return passed

    def skip(self, name: str, reason: str) -> None:
        self._add(Step(name, "skipped", detail=reason))

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        print(f"{step.detail}\n-- {step.name}: {step.status}, {step.seconds:.0f} s", flush=True)
        (self.results / "summary.md").write_text(summary(self.results.name, self.steps))

    @property
    def failed(self) -> bool:
        return any(step.status == "failed" for step in self.steps)


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def summary(title: str, steps: Sequence[Step]) -> str:
    lines = [f"# {title}", "", "| step | | seconds |", "| --- | --- | ---: |"]
    lines += [f"| {step.name} | {step.status} | {step.seconds:.0f} |" for step in steps]
    for step in steps:
        lines += ["", f"## {step.name}: {step.status}", "", "```", step.detail, "```"]
    return "\n".join(lines) + "\n"


def folder_name(device: str, when: datetime.datetime) -> str:
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-') or 'unknown-device'}-{when:%Y%m%d-%H%M%S}"


def find_tool(name: str) -> str | None:
    """In the PATH, or where the CUDA toolkit usually is."""
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(f"{home}/bin" for home in homes if home))


def describe_gpu() -> tuple[str, str]:
    """Its name and its architecture as CMake names it ('90'); empty where there is no telling."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        first = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()[0]
        name, _, capability = first.rpartition(",")
        return name.strip(), capability.strip().replace(".", "")
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    try:
        import torch

        major, minor = torch.cuda.get_device_capability(0)
        return torch.cuda.get_device_name(0), f"{major}{minor}"
    except (ImportError, RuntimeError, AssertionError):
        return "", ""


def build(run: Run, folder: Path, architecture: str) -> bool:
    nvcc = find_tool("nvcc")
    if not nvcc:
        run.skip("build", "nvcc was not found in the PATH, CUDA_HOME or /usr/local/cuda")
        return False
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DLITEDETR_TESTS=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    options += ["-DLITEDETR_ONNXRUNTIME=OFF"]  # which would be downloaded, and is not checked here
    options += [f"-DCMAKE_CUDA_ARCHITECTURES={architecture}"] if architecture else []
    return run.command("configure", ["cmake", "-S", REPOSITORY, "-B", folder, *options]) and run.command(
        "build", ["cmake", "--build", folder, "--parallel", os.cpu_count() or 1]
    )


def python_tests_command() -> list[str]:
    """pytest where it and what tests/conftest.py imports are there; else the folder's own runner."""
    has_pytest = all(importlib.util.find_spec(name) for name in ("pytest", "numpy"))
    return [sys.executable, "-m", *(["pytest", "-q", "tests/gpu"] if has_pytest else ["tests.gpu"])]


def timing_command(output: Path, deformable_detr: Path | None) -> list[object]:
    command = [sys.executable, REPOSITORY / "benchmarks" / "kernels.py", "--device", "cuda", "--output", output]
    command += ["--sizes", "full800,high800,dec800", "--cold"]
    return command + (["--deformable-detr", deformable_detr.resolve()] if deformable_detr else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results" / "gpu")
    parser.add_argument("--build", type=Path, default=REPOSITORY / "build" / "gpu")
    parser.add_argument("--deformable-detr", type=Path, help="a checkout, whose CUDA kernel is timed as well")
    parser.add_argument("--skip-timing", action="store_true")
    options = parser.parse_args()
    device, architecture = describe_gpu()
    now = datetime.datetime.now(datetime.timezone.utc)
    run = Run(options.results.resolve() / folder_name(device, now))
    folder = options.build.resolve()
    driver = folder / "plugins" / "tests" / "kda_cuda_test"

    if shutil.which("nvidia-smi"):
        run.command("nvidia-smi", ["nvidia-smi"], timeout=60)
    if not build(run, folder, architecture):
        print("there is nothing to check without a build", file=sys.stderr)
        return 1
    run.command("ctest", ["ctest", "--test-dir", folder, "--output-on-failure"])

    sanitizer = find_tool("compute-sanitizer")
    for tool in ("memcheck", "racecheck", "initcheck"):
        if not sanitizer:
            run.skip(tool, "compute-sanitizer was not found in the PATH, CUDA_HOME or /usr/local/cuda")
        else:
            run.command(tool, [sanitizer, "--tool", tool, "--error-exitcode", "1", driver, SANITIZER_ROUNDS])

    # The library just built, and the package as it lies here.
    environment = {"LITEDETR_LIBRARY_PATH": str(folder / "plugins" / "kda"), "PYTHONPATH": str(REPOSITORY)}
    if importlib.util.find_spec("torch") is None:
        run.skip("tests-gpu", f"{sys.executable} has no torch")
        run.skip("timing", f"{sys.executable} has no torch")
    else:
        run.command("tests-gpu", python_tests_command(), **environment)
        if options.skip_timing:
            run.skip("timing", "--skip-timing")
        else:
            timing = timing_command(run.results / "kernels", options.deformable_detr)
            run.command("timing", timing, timeout=7200, **environment)
    print("wrote", run.results)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
