"""tools/gpu_check.py without a GPU: its steps, limits and archive, and its dry run as a user starts it."""

import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

NEEDS_DEVICE = False  # conftest.py
REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "tools" / "gpu_check.py"
spec = importlib.util.spec_from_file_location("gpu_check", SOURCE)
gpu_check = importlib.util.module_from_spec(spec)
sys.modules["gpu_check"] = gpu_check  # dataclasses look their module up
spec.loader.exec_module(gpu_check)
LONG = 600.0  # seconds, for what must not end by its limit on a busy machine


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def archived(archive: Path) -> dict[str, str]:
    """Text of every file, by its name without the folder; of a chart, what it is as text."""
    with tarfile.open(archive) as files:
        return {
            Path(member.name).name: files.extractfile(member).read().decode(errors="replace")
            for member in files
            if member.isfile()
        }


@pytest.fixture
def make_run(tmp_path):
    return lambda seconds=LONG, **options: gpu_check.Run(tmp_path / "a-gpu", tmp_path / "output", seconds, **options)


def test_a_failing_step_does_not_stop_the_others(make_run, tmp_path, capsys):
    run = make_run()
    for step in (
        gpu_check.Step("bad", [python("raise SystemExit('broken')"), python("print('never run')")]),
        gpu_check.Step("killed", [python("import os; os.kill(os.getpid(), 9)")]),
        gpu_check.Step("absent", [["/no/such/program"]]),
        gpu_check.Step("unbuilt", [python("")], needs=[tmp_path / "library.so"]),
        gpu_check.Step("no device", [python(f"raise SystemExit({gpu_check.SKIPPED})")]),
        gpu_check.Step("plugin", [python("")], obstacle="no headers"),
        gpu_check.Step("good", [python("import os; print('see', os.environ['EXTRA'])")], {"EXTRA": "this"}),
    ):
        run.add(step)
    assert [step.status for step in run.steps] == ["failed"] * 3 + ["skipped"] * 3 + ["passed"]
    assert run.failed
    run.finish()
    shown = capsys.readouterr().out
    for line in ("see this\n", "broken\n", "plugin: skipped, no headers\n", "bad: failed, exit status 1; see bad.log\n",
                 "killed: failed, ended by SIGKILL", "library.so is not in"):  # fmt: skip
        assert line in shown, shown
    assert shown.rindex("good: passed") < shown.rindex("bad: failed") < shown.rindex("unbuilt: skipped")
    assert "never run" not in (tmp_path / "a-gpu" / "bad.log").read_text().partition("\n")[2]


def test_nothing_uses_a_build_that_failed(make_run, tmp_path):
    (tmp_path / "old.so").touch()
    run = make_run()
    run.add(gpu_check.Step("build", [python("raise SystemExit(2)")]))
    run.add(gpu_check.Step("driver", [python("")], needs=[tmp_path / "old.so"]))
    assert str(run.steps[1]) == "driver: skipped, the build failed"


def test_a_step_that_hangs_is_stopped_with_all_that_it_started(make_run, tmp_path):
    """It neither ends when asked to nor waits for its child, and both hold the log open."""
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('hangs', flush=True); "
    code = (
        f"{child}import subprocess, sys, os; p = subprocess.Popen([sys.executable, '-c', '''{child}time.sleep(600)'''])"
    )
    code += f"; open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{p.pid}}'); time.sleep(600)"
    run = make_run(step_seconds=LONG)
    # Stopped as soon as it hangs: by its limit, which has no other clock than this one here.
    real = gpu_check.time.monotonic
    gpu_check.time = type("Clock", (), {
        "sleep": staticmethod(time.sleep),
        "monotonic": staticmethod(lambda: real() + 1e4 * (tmp_path / "pids").exists()),
    })  # fmt: skip
    try:
        run._end += 1e5  # the whole call's
        run.add(gpu_check.Step("hang", [python(code)]))
        run.add(gpu_check.Step("next", [python("print('goes on')")]))
    finally:
        gpu_check.time = time
    hang, following = run.steps
    assert (hang.status, following.status) == ("failed", "passed")
    assert "stopped at its limit of 600 s" in hang.detail
    assert "hangs" in archived(run.archive)["hang.log"]
    for process in map(int, (tmp_path / "pids").read_text().split()):
        assert not Path(f"/proc/{process}").exists() or ") Z " in Path(f"/proc/{process}/stat").read_text()


def test_the_whole_stops_at_its_limit(make_run):
    run = make_run(seconds=3.0, step_seconds=2.9)
    run.add(gpu_check.Step("first", [python("import time; time.sleep(600)")]))
    run.add(gpu_check.Step("second", [python("")]))
    assert [step.status for step in run.steps] == ["failed", "skipped"]
    assert "the time for the whole call was over" in run.steps[1].detail
    run = make_run(seconds=2.0, step_seconds=LONG)
    run._step_seconds, least = 1e3, gpu_check.LEAST_SECONDS
    gpu_check.LEAST_SECONDS = 0.5
    try:
        run.add(gpu_check.Step("first", [python("import time; time.sleep(600)")]))
    finally:
        gpu_check.LEAST_SECONDS = least
    assert run.steps[0].status == "skipped" and "time for the whole call was over" in run.steps[0].detail
    assert not run.failed


def test_the_archive_is_renewed_after_every_step_and_while_one_runs(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ARCHIVE_PERIOD", 0.0)
    run = make_run()
    assert archived(run.archive).keys() == {"summary.md"}
    run.add(gpu_check.Step("first", [python("print('one')")]))
    assert "one" in archived(run.archive)["first.log"] and "| first | passed |" in archived(run.archive)["summary.md"]
    # The second step reads the archive while it runs, until it finds what it has printed itself.
    code = f"""
import tarfile, time
print("two", flush=True)
for _ in range(1000):
    with tarfile.open({str(run.archive)!r}) as archive:
        if "a-gpu/second.log" in archive.getnames() and b"two\\n" in archive.extractfile("a-gpu/second.log").read():
            break
    time.sleep(0.05)
else:
    raise SystemExit("the archive was not renewed")
"""
    run.add(gpu_check.Step("second", [python(code)]))
    assert run.steps[1].status == "passed"
    assert archived(run.archive).keys() == {"summary.md", "first.log", "second.log"}
    assert {path.name for path in run.output.iterdir()} == {"summary.md", "a-gpu.tar.gz"}


def test_figures(tmp_path):
    rows = [
        {"contender": "op", "median_ms": 0.0714, "times_op": 1.0, "of_l2": 0.53, "of_memory": 0.612},
        {"contender": "PyTorch official form", "median_ms": 8.0, "times_op": 112.0},
        {"contender": "Deformable DETR FP32 kernel", "median_ms": 0.9, "times_op": 12.6},
        {"contender": "torch.compile"},
    ]
    (report := tmp_path / "full800-fp16.json").write_text(json.dumps({"results": rows}))
    official, bounds = gpu_check.figures(report)
    assert "op 0.0714 ms" in official and "kernel 0.9 ms, 12.6 times" in official and "form 8 ms, 112 times" in official
    assert "53 % of l2, 61 % of memory" in bounds
    for text in ('{"results": []}', '{"results": [{"contender": "op"}]}', "{"):  # none, wrong and not timed, broken
        report.write_text(text)
        assert gpu_check.figures(report) == ["FP16 full800: not measured"]


def test_the_benchmark_takes_its_options(tmp_path):
    from litedetr_deploy.benchmark import kernels

    names = [contender.name for contender in kernels.RIVALS["cuda"]]
    for what in (("full800", "fp16", tmp_path), ("full800", "fp32"), ("high800,dec800", "fp16,fp32")):
        command = gpu_check.timing_command(["python", "kernels.py"], tmp_path / "out", *what)
        options = kernels.make_parser().parse_args(list(map(str, command[2:])))
        assert (options.device, options.batches, options.output) == ("cuda", "1", tmp_path / "out")
        assert kernels.chosen(options.sizes, kernels.SIZES, "--sizes") == what[0].split(",")
        assert set(kernels.chosen(options.dtypes, kernels.DTYPES, "--dtypes")) == set(what[1].split(","))
        left_out = set(names) - set(kernels.chosen(options.only, names, "--only"))
        assert left_out == (set() if what[0] == "full800" else {"torch.compile"})


def test_folder_name():
    when = datetime.datetime(2026, 1, 2, 3, 4, 5)
    assert gpu_check.folder_name("NVIDIA H100 80GB HBM3", when) == "nvidia-h100-80gb-hbm3-20260102-030405"
    assert gpu_check.folder_name("", when) == "unknown-device-20260102-030405"


def start(script: Path, *arguments, **options) -> subprocess.Popen:
    command = list(map(str, (sys.executable, script, *arguments)))
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "build,tea"], "--steps has tea; there are device, build, driver"),
        (["--minutes", "0"], "--minutes is 0.0"),
        (["--tensorrt-headers", "."], "which has no NvInferRuntime.h"),
        (["--deformable-detr", "."], "which has no models/ops/src"),
        ([], "no GPU was found"),
    ],
)
def test_wrong_use_exits_with_2(arguments, message):
    # Without a GPU that nvidia-smi or PyTorch would find, on any machine.
    environment = os.environ | {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    process = start(SOURCE, *arguments, env=environment)
    _, errors = process.communicate()
    assert process.returncode == 2 and message in errors, errors


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the script reads, where a file too many is seen."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("benchmarks", "litedetr_deploy", "tests/gpu", "tools"):
        ignored = shutil.ignore_patterns("__pycache__", "results", "*.safetensors")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    for name in ("CMakeLists.txt", "pyproject.toml", "tests/__init__.py"):
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


def dry_run(checkout: Path, tmp_path: Path, *arguments) -> tuple[str, dict[str, str]]:
    """Return what a dry run prints, and what its archive has; it has written nothing into the checkout."""
    before = sorted(checkout.rglob("*"))
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    # As long as a busy machine needs: the limits have tests of their own.
    options = ("--dry-run", "--minutes", "60", "--output", tmp_path / "output")
    process = start(checkout / "tools" / "gpu_check.py", *options, *arguments, env=environment)
    shown, errors = process.communicate()
    assert process.returncode == 0, shown + errors
    assert sorted(checkout.rglob("*")) == before
    lines = shown.splitlines()
    assert lines[0] == lines[-2] == gpu_check.DRY_RUN
    (archive,) = (tmp_path / "output").glob("*.tar.gz")
    assert lines[-1] == f"wrote {archive}"
    files = archived(archive)
    assert gpu_check.DRY_RUN in files["summary.md"]
    return shown, files


QUICK = "device,build,driver,plugin,racecheck,initcheck,memcheck"  # those that import no PyTorch


def test_dry_run_without_headers(checkout, tmp_path):
    shown, files = dry_run(checkout, tmp_path, "--steps", QUICK)
    if "plugin: passed" in shown:
        pytest.skip("this system has TensorRT's headers")
    assert "\nplugin: skipped, no headers" in shown
    for step in set(QUICK.split(",")) - {"plugin"}:
        assert f"\n{step}: passed, by a stand-in" in shown
        assert f"{step}.log" in files
    assert "-DTENSORRT_INCLUDE_DIR" not in files["build.log"] and "--launch-count 24" in files["racecheck.log"]


def test_dry_run_with_headers(checkout, tmp_path):
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers" / gpu_check.HEADER).touch()
    shown, files = dry_run(checkout, tmp_path, "--steps", QUICK, "--tensorrt-headers", tmp_path / "headers")
    assert "\nplugin: passed, by a stand-in" in shown
    assert f"-DTENSORRT_INCLUDE_DIR={tmp_path / 'headers'}" in files["build.log"]


@pytest.mark.slow
def test_dry_run_of_everything(checkout, tmp_path):
    """The real benchmark and the real pytest, with neither a device nor a library."""
    (tmp_path / "detr" / "models" / "ops" / "src").mkdir(parents=True)
    shown, files = dry_run(checkout, tmp_path, "--deformable-detr", tmp_path / "detr")
    for step in set(gpu_check.STEPS) - {"plugin"}:
        assert f"\n{step}: passed, by a stand-in" in shown, shown
    assert "stand-in, no measurement: FP16 full800 against the official kernels: op " in shown
    assert "Deformable DETR FP32 kernel " in shown and "% of l2" in shown
    cases = {name: json.loads(files[f"{name}.json"])["results"] for name in gpu_check.STEPS if f"{name}.json" in files}
    found = {name: {(row["size"], row["dtype"], row["batch"]) for row in rows} for name, rows in cases.items()}
    small = {(size, dtype, 1) for size in ("high800", "dec800") for dtype in ("fp16", "fp32")}
    assert found == {
        "full800-fp16": {("full800", "fp16", 1)},
        "full800-fp32": {("full800", "fp32", 1)},
        "other-sizes": small,
    }
    compiled = {name for name, rows in cases.items() if any(row["contender"] == "torch.compile" for row in rows)}
    assert compiled == {"full800-fp16", "full800-fp32"}
    assert " skipped in " in files["tests.log"] or " passed" in files["tests.log"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_the_archive(checkout, tmp_path, number):
    """It comes while the driver of an earlier build hangs; the steps before it are there, and the table is printed."""
    for name in ("kda/liblitedetr_kda.so", "tests/kda_cuda_test"):
        path = tmp_path / "build" / "plugins" / name
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\necho at work\nexec sleep 600\n")
        path.chmod(0o755)
    arguments = (
        "--dry-run",
        "--steps",
        "driver,plugin",
        "--build",
        tmp_path / "build",
        "--output",
        tmp_path / "output",
    )
    process = start(checkout / "tools" / "gpu_check.py", *arguments, env=os.environ | {"TMPDIR": str(tmp_path)})
    shown = ""
    while "at work" not in shown:
        line = process.stdout.readline()
        assert line, shown + process.stderr.read()
        shown += line
    process.send_signal(number)
    rest, errors = process.communicate()
    assert process.returncode == 128 + number, rest + errors
    assert "\ndriver: skipped, interrupted after" in rest and not errors
    (archive,) = (tmp_path / "output").glob("*.tar.gz")
    files = archived(archive)
    assert "at work" in files["driver.log"] and "interrupted after" in files["summary.md"]
