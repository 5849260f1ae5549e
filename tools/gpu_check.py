"""Build, check and time the CUDA kernels on a machine with a GPU, in one call of at most nine minutes.

Needs nvcc, CMake and PyTorch, and no network; nothing is installed, and nothing is written into the repository.  What
matters most comes first, no step takes more than four minutes, and a step that fails does not stop the others.  OUTPUT
gets summary.md and one archive with every log and report, renewed after every step and while one runs: whatever ends
the call, what is done is there.  Exits with 1 where a check failed, and with 2 where it was used wrongly.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import datetime
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
STAND_INS = REPOSITORY / "tests" / "gpu" / "stand_ins.py"
STEP_SECONDS = 240.0  # one that hangs leaves time for the others
LEAST_SECONDS = 5.0  # a step is not begun with less
GRACE = 3.0  # seconds between asking a process to end and killing it
ARCHIVE_PERIOD = 20.0  # seconds, while a step runs
TAIL_LINES = 15  # of a step's log, in summary.md
SKIPPED = 77  # the C++ test's exit status where it finds no device
LAUNCHES = "24"  # under compute-sanitizer, which makes each many times slower: one for each round of the test's sweep
HEADER = "NvInferRuntime.h"
STEPS = {
    "device": "what nvidia-smi and nvcc say: figures mean nothing without their versions",
    "build": "the kernels and their C++ test, for this GPU",
    "driver": "the C++ test: every type and shape against the definition",
    "full800-fp16": "times of the largest attention, torch.compile and the kernel of --deformable-detr among them",
    "tests": "tests/gpu",
    "plugin": "the TensorRT plugin, driven through TensorRT's interfaces",
    "racecheck": f"compute-sanitizer, {LAUNCHES} launches",
    "initcheck": f"compute-sanitizer, {LAUNCHES} launches",
    "memcheck": "compute-sanitizer, all of the C++ test",
    "full800-fp32": "as full800-fp16",
    "other-sizes": "times of the high-level tokens and the decoder, FP16 and FP32",
}
PYTEST = {"PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # whatever plugins the machine has
DRY_RUN = "DRY RUN: stand-ins ran in place of the tools and the GPU. Nothing was built, checked or measured."


@dataclass
class Step:
    """Commands that run one after another, and what came of them."""

    name: str
    commands: Sequence[Sequence[object]] = ()
    environment: dict[str, str] = field(default_factory=dict)
    needs: Sequence[Path] = ()  # what the build makes, or an earlier one left
    obstacle: str = ""  # why it cannot run here
    status: str = ""  # 'passed', 'failed' or 'skipped'
    seconds: float = 0.0
    detail: str = ""  # why it is not 'passed'
    tail: str = ""  # the end of its log

    def __str__(self) -> str:
        return f"{self.name}: {self.status}, {self.detail or f'{self.seconds:.0f} s'}"


class Run:
    """Runs steps, shows and keeps their logs in `results`, and keeps the archive beside summary.md in `output`."""

    def __init__(self, results: Path, output: Path, seconds: float, step_seconds: float = STEP_SECONDS,
                 dry_run: bool = False):  # fmt: skip
        self.results, self.output, self.steps = results, output, []
        self.archive = output / f"{results.name}.tar.gz"
        # Stand-ins do not hang, and a machine without a GPU may be a slow one.
        self._step_seconds, self._dry_run = math.inf if dry_run else step_seconds, dry_run
        # The last of the time is for ending a step that hangs, and for the archive.
        self._end = time.monotonic() + 0.97 * seconds
        for folder in (results, output):
            folder.mkdir(parents=True, exist_ok=True)
        self._save()

    def add(self, step: Step) -> None:
        """Run a step, or skip it where something is missing; where the call is interrupted, keep what it did."""
        self.steps.append(step)
        build_failed = any(earlier.name == "build" and earlier.status == "failed" for earlier in self.steps)
        missing = [path for path in step.needs if not path.exists()]
        left = self._end - time.monotonic()
        if step.obstacle or not step.commands:
            step.detail = step.obstacle
        elif build_failed and step.needs:
            step.detail = "the build failed"
        elif missing:
            step.detail = f"{missing[0].name} is not in {missing[0].parent}: run the step build, or give --build"
        elif left < min(LEAST_SECONDS, self._step_seconds):
            step.detail = "the time for the whole call was over"
        step.status = "skipped" if step.detail else ""
        if not step.status:
            print(f"== {step.name}: {STEPS.get(step.name, '')}", flush=True)
        begun = time.monotonic()
        try:
            if not step.status:
                self._run(step, begun, min(left, self._step_seconds))
        except KeyboardInterrupt:
            step.status, step.detail = "skipped", f"interrupted after {time.monotonic() - begun:.0f} s"
            raise
        finally:
            step.seconds = time.monotonic() - begun
            print(f"-- {step}", flush=True)
            self._save()

    def _run(self, step: Step, begun: float, limit: float) -> None:
        log = self.results / f"{step.name}.log"
        for command in step.commands:
            try:
                status = self._stream([str(part) for part in command], log, begun + limit, step.environment)
            except OSError as error:  # a program that is not there, or does not start
                step.status, step.detail = "failed", str(error)
                break
            if status is None and limit < self._step_seconds:
                step.status, step.detail = (
                    "skipped",
                    f"stopped after {limit:.0f} s: the time for the whole call was over",
                )
            elif status is None:
                step.status, step.detail = "failed", f"stopped at its limit of {limit:g} s; {log.name} has what it did"
            elif status == SKIPPED:
                step.status, step.detail = "skipped", "the program found no CUDA device"
            elif status:
                how = f"exit status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"
                step.status, step.detail = "failed", f"{how}; see {log.name}"
            if step.status:
                break
        if not step.status:
            step.status, step.detail = "passed", "by a stand-in" * self._dry_run
        text = log.read_text(errors="replace") if log.exists() else ""
        step.tail = "\n".join(text.strip().splitlines()[-TAIL_LINES:])

    def _stream(self, command: list[str], log: Path, end: float, environment: dict[str, str]) -> int | None:
        """Show what a command writes into its log; return its exit status, None where its time was over.

        It writes into the file itself: a program that it left behind cannot hold up a pipe, and the log is whole.
        """
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        with log.open("ab") as written, log.open("rb") as read:
            read.seek(written.tell())
            written.write(f"$ {' '.join(command)}\n".encode())
            written.flush()
            process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL,
                                       stdout=written, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
            renewed = time.monotonic()
            try:
                while process.poll() is None and time.monotonic() < end:
                    print(decode(read.read()), end="", flush=True)
                    time.sleep(0.05)
                    if time.monotonic() - renewed > ARCHIVE_PERIOD:
                        self._save()
                        renewed = time.monotonic()
                return process.poll()
            finally:
                _stop(process)
                print(decode(read.read(), True), end="", flush=True)

    def finish(self) -> None:
        """Print the table, and the figures."""
        self._save()
        order = ("passed", "failed", "skipped").index
        lines = map(str, sorted(self.steps, key=lambda step: order(step.status)))
        found = [f"{'stand-in, no measurement: ' * self._dry_run}{line}" for line in self.figures()]
        print("", *lines, *found, *[DRY_RUN] * self._dry_run, f"wrote {self.archive}", sep="\n", flush=True)

    def _save(self) -> None:
        text = summary(self.results.name, self.steps, self.figures(), self._dry_run)
        for folder in (self.results, self.output):
            (folder / "summary.md").write_text(text)
        unfinished = self.archive.with_name(f".{self.archive.name}.unfinished")
        with tarfile.open(unfinished, "w:gz") as archive:
            for path in sorted(self.results.glob("[!.]*")):  # hidden ones are reports being written, and may vanish
                archive.add(path, f"{self.results.name}/{path.name}")
        unfinished.replace(self.archive)

    def figures(self) -> list[str]:
        return figures(self.results / "full800-fp16.json")

    @property
    def failed(self) -> bool:
        return any(step.status == "failed" for step in self.steps)


def _stop(process: subprocess.Popen) -> None:
    """End a process and all that it started; what hangs in the driver may outlive even this, and is left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL) if process.poll() is None else (signal.SIGKILL,):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def figures(report: Path) -> list[str]:
    """Return the two lines that matter, from the benchmark's report: against the official kernels, and the bounds."""
    try:
        rows = {row["contender"]: row for row in json.loads(report.read_text())["results"]}
        op = rows["op"]
        milliseconds = op["median_ms"]
    except (OSError, ValueError, KeyError):
        return ["FP16 full800: not measured"]
    others = [f"{name} {row['median_ms']:.3g} ms, {row['times_op']:.3g} times as long" for name, row in rows.items()
              if ("Deformable DETR" in name or "official" in name) and row.get("times_op")]  # fmt: skip
    if not any("Deformable DETR" in name for name in rows):
        others.append("Deformable DETR's kernel: none (--deformable-detr)")
    shares = [f"{100 * op[name]:.0f} % {name.replace('_', ' ')}" for name in sorted(op) if name.startswith("of_")]
    return [
        f"FP16 full800 against the official kernels: op {milliseconds:.3g} ms; {'; '.join(others)}",
        f"FP16 full800 against the bounds: {', '.join(shares) or 'not reported'} (docs/benchmarks.md)",
    ]


def summary(title: str, steps: Sequence[Step], found: Sequence[str], dry_run: bool) -> str:
    lines = [f"# {title}", "", *[DRY_RUN, ""] * dry_run, "| step | | seconds | |", "| --- | --- | ---: | --- |"]
    lines += [f"| {step.name} | {step.status} | {step.seconds:.0f} | {step.detail} |" for step in steps]
    lines += ["", *(f"- {line}" for line in found)]
    for step in steps:
        lines += ["", f"## {step.name}: {step.status}", "", "```", step.tail, "```"] if step.tail else []
    return "\n".join(lines) + "\n"


def folder_name(device: str, when: datetime.datetime) -> str:
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-') or 'unknown-device'}-{when:%Y%m%d-%H%M%S}"


def find_tool(name: str) -> list[str]:
    """The command's start: in the PATH, or where the CUDA toolkit usually is; empty where it is not there."""
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    bins = os.pathsep.join(f"{home}/bin" for home in homes if home)
    found = shutil.which(name) or shutil.which(name, path=bins)
    return [found] if found else []


def stand_in(name: str) -> list[str]:
    """The same, in a dry run."""
    return [sys.executable, str(STAND_INS), name]


def describe_gpu(nvidia_smi: list[str]) -> tuple[str, str]:
    """Its name and its architecture as CMake names it ('90'); empty where there is no telling."""
    query = [*nvidia_smi, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        first = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()[0]
        name, _, capability = first.rpartition(",")
        return name.strip(), capability.strip().replace(".", "")
    with contextlib.suppress(ImportError, RuntimeError, AssertionError):
        import torch

        major, minor = torch.cuda.get_device_capability(0)
        return torch.cuda.get_device_name(0), f"{major}{minor}"
    return "", ""


def torch_obstacle(dry_run: bool) -> str:
    """Why PyTorch cannot use the GPU; empty where it can.  Asked of a process of its own, whose hanging ends."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no PyTorch"
    if dry_run:
        return ""
    code = "import torch; print(torch.__version__, 'finds no CUDA device' * (not torch.cuda.is_available()))"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "PyTorch took more than a minute to find the GPU"
    if done.returncode:
        return f"PyTorch cannot be imported: {(done.stderr.splitlines() or ['it ended'])[-1]}"
    return f"PyTorch {done.stdout.strip()}" if "no CUDA" in done.stdout else ""


def find_headers(given: Path | None, build: Path) -> Path | None:
    """The folder of TensorRT's headers: given, what an install or an earlier call left, or the system's."""
    system = ["/usr/include", f"/usr/include/{platform.machine()}-linux-gnu", "/usr/local/include"]
    system += [str(Path(home, "include")) for home in (os.environ.get("TENSORRT_HOME"), "/usr/local/tensorrt") if home]
    left = [*REPOSITORY.glob("build/*/tensorrt-headers"), build / "tensorrt-headers"]
    folders = [given] if given else [*left, *map(Path, system)]
    return next((folder.resolve() for folder in folders if (folder / HEADER).is_file()), None)


def tests_command() -> list[str]:
    """pytest, where it is there; else the folder's own runner."""
    if importlib.util.find_spec("pytest") is None:
        return [sys.executable, "-m", "tests.gpu"]
    # addopts of pyproject.toml names an option of xdist; the tests of this script would start it again.
    options = ["-v", "-o", "addopts=", "-p", "no:cacheprovider", "--confcutdir=tests/gpu"]
    return [sys.executable, "-m", "pytest", *options, "--ignore-glob=*_check.py", "tests/gpu"]


def timing_command(start: list[str], output: Path, sizes: str, dtypes: str, deformable_detr: Path | None = None):
    """Batch 1.  torch.compile takes half a minute for each size and type: with the largest alone."""
    command = [*start, "--device", "cuda", "--batches", "1", "--cold", "--sizes", sizes, "--dtypes", dtypes]
    if sizes != "full800":
        command += ["--only", "op,plain op,PyTorch official form,PyTorch sampling once"]
    return [*command, "--output", output, *(["--deformable-detr", deformable_detr] if deformable_detr else [])]


def make_steps(options: argparse.Namespace, build: Path, results: Path, architecture: str) -> list[Step]:
    """All steps in their order, most telling first."""
    find = stand_in if options.dry_run else find_tool
    cmake, nvcc, sanitizer, nvidia_smi = map(find, ("cmake", "nvcc", "compute-sanitizer", "nvidia-smi"))
    driver, harness = (build / "plugins" / "tests" / name for name in ("kda_cuda_test", "tensorrt_harness"))
    library, plugin = build / "plugins" / "kda" / "liblitedetr_kda.so", build / "plugins" / "tensorrt"
    headers = find_headers(options.tensorrt_headers, build)
    no_tool = "{} was not found in the PATH, CUDA_HOME or /usr/local/cuda".format

    configure = [*cmake, "-S", REPOSITORY, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DLITEDETR_TESTS=ON"]
    configure += [f"-DCMAKE_CUDA_COMPILER={nvcc[-1] if nvcc else ''}", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}"]
    configure += ["-DLITEDETR_ONNXRUNTIME=OFF", "-DLITEDETR_OPENVINO=OFF"]  # not checked here
    configure += [f"-DTENSORRT_INCLUDE_DIR={headers}"] if headers else []
    make = [*cmake, "--build", build, "--parallel", os.cpu_count() or 1, "--target"]
    # Without this CMake would download the headers.
    offline = {"PIP_NO_INDEX": "1"}
    # The library just built, the package as it lies here, and its compiled modules elsewhere.
    python = {"LITEDETR_LIBRARY_PATH": str(library.parent), "PYTHONPATH": str(REPOSITORY)}
    python |= {"PYTHONPYCACHEPREFIX": str(build / "pycache")}
    no_torch = torch_obstacle(options.dry_run)
    benchmark = [sys.executable, str(REPOSITORY / "benchmarks" / "kernels.py")]

    def timing(name: str, *what) -> Step:
        start = stand_in("benchmark") if options.dry_run else benchmark
        command = timing_command(start, results / name, *what)
        return Step(name, [command], python, [library], no_torch)

    def sanitized(tool: str, *arguments) -> Step:
        command = [*sanitizer, "--tool", tool, "--error-exitcode", "1", *arguments]
        return Step(tool, [command], {}, [driver], "" if sanitizer else no_tool("compute-sanitizer"))

    few = ("--launch-count", LAUNCHES, driver, LAUNCHES)
    missing = [name for name, found in (("cmake", cmake), ("nvcc", nvcc)) if not found]
    # A build that was brought along is run as it is.
    build_plugin = [] if missing else [configure, [*make, "tensorrt_harness"]]
    no_headers = "" if headers or (missing and harness.exists()) else (
        f"no headers: {HEADER} was not found; tools/get_tensorrt_headers.py FOLDER downloads them, then give "
        "--tensorrt-headers FOLDER"
    )  # fmt: skip
    steps = [
        Step("device", [*[nvidia_smi] * bool(nvidia_smi), *[[*nvcc, "--version"]] * bool(nvcc)],
             obstacle="" if nvidia_smi or nvcc else no_tool("nvidia-smi")),
        Step("build", [configure, [*make, "litedetr_kda", "kda_cuda_test"]], offline,
             obstacle=no_tool(" and ".join(missing)) if missing else ""),
        Step("driver", [[driver]], {}, [driver]),
        timing("full800-fp16", "full800", "fp16", options.deformable_detr),
        Step("tests", [tests_command()], python | PYTEST, [library], no_torch),
        Step("plugin", [*build_plugin, [harness, plugin / "liblitedetr_tensorrt.so"]], offline,
             [library, *([harness] if missing else [])], no_headers),
        sanitized("racecheck", *few),
        sanitized("initcheck", *few),
        sanitized("memcheck", driver, LAUNCHES),
        timing("full800-fp32", "full800", "fp32"),
        timing("other-sizes", "high800,dec800", "fp16,fp32"),
    ]  # fmt: skip
    return [step for step in steps if step.name in options.steps]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = "\n".join(f"  {name:13} {about}" for name, about in STEPS.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"steps, in their order:\n{names}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--steps", default=",".join(STEPS), help="which, separated by commas; default all")
    add("--output", type=Path, help="folder of summary.md and the archive; default a new temporary one")
    add("--build", type=Path, help="folder of the build, to use it again; default a new temporary one")
    add("--minutes", type=float, default=9.0, help="after which the whole stops with what it has; default 9")
    add("--deformable-detr", type=Path, help="a checkout of Deformable DETR, whose CUDA kernel is timed as well")
    add("--tensorrt-headers", type=Path, help=f"the folder of {HEADER}, where it is in none of the usual places")
    add("--dry-run", action="store_true", help="go through all steps with stand-ins for the tools and the GPU: shows "
        "mistakes in this script, and measures nothing")  # fmt: skip
    options = parser.parse_args(arguments)
    options.steps = [name.strip() for name in options.steps.split(",") if name.strip()]
    if unknown := [name for name in options.steps if name not in STEPS]:
        parser.error(f"--steps has {', '.join(unknown)}; there are {', '.join(STEPS)}")
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}; it must be more than 0")
    for option, folder, content in (
        ("--deformable-detr", options.deformable_detr, "models/ops/src"),
        ("--tensorrt-headers", options.tensorrt_headers, HEADER),
    ):
        if folder and not (folder / content).exists():
            parser.error(f"{option} is {folder}, which has no {content}")
    options.deformable_detr = options.deformable_detr and options.deformable_detr.resolve()
    return options


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def main(arguments: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    options = parse(arguments)
    device, architecture = describe_gpu(stand_in("nvidia-smi") if options.dry_run else ["nvidia-smi"])
    if not device:
        print("error: no GPU was found, by nvidia-smi or PyTorch; --dry-run goes through the steps without one",
              file=sys.stderr)  # fmt: skip
        return 2
    scratch = Path(tempfile.mkdtemp(prefix="litedetr-gpu-check-"))
    name = folder_name("dry-run" if options.dry_run else device, datetime.datetime.now(datetime.timezone.utc))
    results, build = scratch / name, (options.build or scratch / "build").resolve()
    try:
        seconds = 60 * options.minutes - (time.monotonic() - begun)
        run = Run(results, (options.output or scratch).resolve(), seconds, dry_run=options.dry_run)
    except OSError as error:
        print(f"error: --output is {options.output}: {error}", file=sys.stderr)
        return 2
    print(*[DRY_RUN] * options.dry_run, f"{device}; results go into {run.archive}", sep="\n", flush=True)
    interrupted = 0
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for step in make_steps(options, build, results, architecture):
            run.add(step)
    except KeyboardInterrupt as error:
        interrupted = error.args[0]
    finally:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not lose what the first kept
    run.finish()
    for number, handler in previous.items():
        signal.signal(number, handler)
    return 128 + interrupted if interrupted else int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
