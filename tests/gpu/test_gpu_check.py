"""The parts of tools/gpu_check.py and tools/gpu_check_timing.py that need no GPU."""

import datetime
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

NEEDS_DEVICE = False  # conftest.py
TOOLS = Path(__file__).resolve().parents[2] / "tools"


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gpu_check, timing = _load("gpu_check"), _load("gpu_check_timing")
DEVICE = {
    "name": "A GPU", "capability": "9.0", "multiprocessors": 100, "memory_gib": 80.0, "l2_mib": 50.0, "torch": "2.13",
    "cuda": "13.0", "date": "2026-01-01", "dram_gbps": 2000.0, "l2_gbps": 5000.0,
}  # fmt: skip


def _result(contender: str, size=timing.SIZES[0], **fields) -> timing.Result:
    gathered, compulsory = size.bytes_gathered(1, 2), size.bytes_compulsory(1, 2)
    return timing.Result(contender, size.name, 1, "fp16", size.queries, gathered, compulsory, **fields)


@pytest.mark.parametrize("size", [timing.Size("few", boxes=16), timing.Size("coarsest", first_level=3)], ids=str)
@pytest.mark.parametrize("contender", [name for name in timing.CONTENDERS if name not in ("plain op", "torch.compile")])
def test_contenders_compute_the_same(contender, size):
    inputs = timing.make_inputs(size, 2, timing.torch.float32, "cpu")
    output = timing.CONTENDERS[contender](**inputs, spatial_shapes=timing.torch.tensor(timing.MAPS))
    error, tolerance = timing.errors(inputs, output)
    assert 0 < error < 10 * tolerance


def test_bytes():
    full, decoder = timing.SIZES[0], timing.SIZES[2]
    assert full.queries == 22_223
    assert full.bytes_gathered(1, 2) == 22_223 * 8 * 16 * 4 * 64
    for size in (full, decoder):
        inputs = timing.make_inputs(size, 1, timing.torch.float16, "cpu")
        inputs["output"] = inputs["query"]
        assert size.bytes_compulsory(1, 2) == sum(tensor.numel() * tensor.itemsize for tensor in inputs.values())


def test_report():
    results = [
        _result("op", error=1e-3, tolerance=2e-3, warm_ms=[0.1, 0.2, 0.3], cold_ms=[0.4]),
        _result("PyTorch official form", error=math.nan, tolerance=2e-3, warm_ms=[2.0], cold_ms=[2.0]),
        _result("torch.compile", trouble="RuntimeError: no | Triton"),
    ]
    text = timing.as_markdown(DEVICE, results)
    assert "| op | 0.2000 | 0.4000 | 1.00 | 3641 | 73 % |" in text
    assert "| PyTorch official form | 2.0000 | 2.0000 | 10.00 |" in text
    assert "RuntimeError: no \\| Triton" in text
    assert json.loads(timing.as_json(DEVICE, results))["results"][1]["error"] is None
    assert timing.wrong(results) == []


def test_wrong_results_are_told():
    bad = [_result("op", error=error, tolerance=1e-3, warm_ms=[1], cold_ms=[1]) for error in (2e-3, math.nan)]
    bad.append(_result("op, own key", trouble="OutOfMemoryError: "))
    assert len(timing.wrong(bad)) == 3
    assert "error 2.00e-03, allowed 1.00e-03" in timing.wrong(bad)[0]


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
