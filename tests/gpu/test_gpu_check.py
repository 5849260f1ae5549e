"""The parts of tools/gpu_check.py that need no GPU."""

import datetime
import importlib.util
import subprocess
import sys
from pathlib import Path

NEEDS_DEVICE = False  # conftest.py
SOURCE = Path(__file__).resolve().parents[2] / "tools" / "gpu_check.py"
spec = importlib.util.spec_from_file_location("gpu_check", SOURCE)
gpu_check = importlib.util.module_from_spec(spec)
sys.modules["gpu_check"] = gpu_check  # dataclasses look their module up
spec.loader.exec_module(gpu_check)


def test_the_benchmark_takes_its_options(tmp_path):
    """It refuses for want of a device, or of sources in that folder, and not for want of an option."""
    command = gpu_check.timing_command(tmp_path / "kernels", Path("tests"))
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --de"), done.stderr


def test_steps_report_and_go_on(tmp_path):
    run = gpu_check.Run(tmp_path / "a-gpu")
    assert run.command("good", [sys.executable, "-c", "import os; print(os.environ['EXTRA'])"], EXTRA="seen")
    assert not run.command("bad", [sys.executable, "-c", "raise SystemExit('broken')"])
    assert not run.command("missing", ["/no/such/program"])
    assert not run.command("slow", [sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)
    run.skip("left out", "no tool")
    assert [step.status for step in run.steps] == ["passed", "failed", "failed", "failed", "skipped"]
    assert run.failed
    text = (tmp_path / "a-gpu" / "summary.md").read_text()
    assert "| good | passed |" in text and "broken" in text and "stopped after" in text and "no tool" in text
    assert "seen" in (tmp_path / "a-gpu" / "good.log").read_text()


def test_folder_name():
    when = datetime.datetime(2026, 1, 2, 3, 4, 5)
    assert gpu_check.folder_name("NVIDIA H100 80GB HBM3", when) == "nvidia-h100-80gb-hbm3-20260102-030405"
    assert gpu_check.folder_name("", when) == "unknown-device-20260102-030405"
