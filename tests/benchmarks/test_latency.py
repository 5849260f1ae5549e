"""The latency benchmark on a small detector: what it refuses to time, what it writes, and what it goes on from."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import typer
from typer.testing import CliRunner

from litedetr_deploy.benchmark import harness, latency, parts, plan, sensors, timing
from litedetr_deploy.benchmark.contender import Detector, open_engine, read_trtexec
from litedetr_deploy.benchmark.official import key_aware_deform_attn, ms_deform_attn
from litedetr_deploy.benchmark.plan import Cache
from litedetr_deploy.cli.benchmark import latency as command
from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.ops import reference, schema
from litedetr_deploy.verify.reference import BOXES, INDICES, LOGITS, Reference, Weights, run_pytorch

VARIANT, SIZE = "lite-dino-r26n", (256, 256)
pytestmark = pytest.mark.usefixtures("quick")


def make_spec(backend="onnxruntime-op", **changes):
    return plan.Spec(**{"model": VARIANT, "backend": backend, "precision": "fp32", "batch": 1, "image_size": SIZE,
                       "device": "cpu", "threads": 1} | changes)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """With the small detector exported, and PyTorch's outputs."""
    cache = Cache(tmp_path_factory.mktemp("cache"))
    cache.prepare([make_spec()])
    return cache


@pytest.fixture(scope="module")
def weights():
    return Weights(VARIANT)


@pytest.fixture
def litedetr():
    app = typer.Typer()
    app.command()(command)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


# The official arithmetic


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("kind", ["key is value", "own key", "plain"])
def test_official_arithmetic_is_the_definition(kind, width):
    generator = torch.Generator().manual_seed(0)
    heads, points, shapes = 2, 3, torch.tensor([[5, 7], [3, 4]])
    tokens = int(shapes.prod(1).sum())

    def random(*sizes):
        return torch.rand(*sizes, generator=generator, dtype=torch.float64)

    offsets = 4 * random(2, 6, heads * 2 * points * 2) - 2
    rest = (random(2, tokens, 8), random(2, 6, 2, width), offsets, shapes, heads, points)
    if kind == "plain":
        logits = random(2, 6, heads * 2 * points)
        ours, wanted = ms_deform_attn(logits, *rest), reference.ms_deform_attn(logits, *rest)
    else:
        query, key = random(2, 6, 8), random(2, tokens, 8) if kind == "own key" else None
        ours = key_aware_deform_attn(query, *rest, key)
        wanted = reference.key_aware_deform_attn(query, *rest, key)
    assert (ours - wanted).abs().max() < 100 * torch.finfo(torch.float64).eps


# Plans


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(timing, "usable_cores", lambda: 2)


def test_a_plan_has_every_combination_and_groups_what_is_compared():
    rows = plan.make_plan([VARIANT, "dino-r50"], ["pytorch", "onnxruntime-op"], ["fp32", "fp16"], [1, 2],
                          [SIZE, (320, 256)], "cpu", [1, 2])  # fmt: skip
    assert len(rows) == len(set(rows)) == 2**6
    assert len(latency.groups([harness.Result(row.name, row) for row in rows])) == 8
    on_gpu = plan.make_plan([VARIANT], ["pytorch"], ["fp32"], [1], [SIZE], "cuda", [1, 2])
    assert [row.threads for row in on_gpu] == [1]


@pytest.mark.parametrize(
    "change, part",
    [
        ({"backends": ["onnx"]}, "'onnx'"),
        ({"precisions": ["fp8"]}, "'fp8'"),
        ({"device": "tpu"}, "'tpu'"),
        ({"models": ["lite-dino-r5"]}, "'lite-dino-r5'"),
        ({"models": ["missing.onnx"]}, "missing.onnx does not exist"),
        ({"image_sizes": [(32, 32)]}, "32x32"),
        ({"threads": [100000]}, "--threads is 100000; this machine has 2 cores"),
        ({"batches": [10**7]}, "Batches of 10000000 images of 256x256 need more than"),
        ({"image_sizes": [(100000, 100000)]}, "100000x100000"),
    ],
)
def test_a_plan_refuses_what_does_not_exist(change, part):
    wanted = {"models": [VARIANT], "backends": ["pytorch"], "precisions": ["fp32"], "batches": [1],
              "image_sizes": [SIZE], "device": "cpu", "threads": [1]}  # fmt: skip
    with pytest.raises(LiteDetrError, match=part):
        plan.make_plan(**wanted | change)


def test_an_artifact_keeps_its_own_attention_precision_and_size(cache):
    file = str(cache.model_path(make_spec()))
    rows = plan.make_plan([file], ["pytorch"], ["fp16"], [1], [(640, 640), (800, 1333)], "cpu", [1])
    assert rows == [make_spec(model=file)]
    assert "--checkpoint" in plan.why_missing(rows[0], cache)
    assert not plan.why_missing(rows[0], cache, unchecked=True)
    known = Cache(cache.folder, VARIANT)  # its weights are those whose outputs are there
    assert not plan.why_missing(rows[0], known) and known.reference_path(rows[0]) == cache.reference_path(make_spec())


def test_what_is_missing_is_said(cache, monkeypatch):
    find_spec = importlib.util.find_spec
    absent = {"torch", "openvino"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    assert not plan.why_missing(make_spec(), cache)  # exported, and with PyTorch's outputs
    assert "torch is not installed: pip install litedetr-deploy[export]" in plan.why_missing(
        make_spec("onnxruntime-gather"), cache
    )
    assert "openvino, torch are not installed: pip install litedetr-deploy[openvino,export]" in plan.why_missing(
        make_spec("openvino-gather"), cache
    )
    assert "cuda only" in plan.why_missing(make_spec("pytorch-graph"), cache)
    assert "fp32 and int8 only" in plan.why_missing(make_spec("openvino-gather", precision="fp16"), cache)


def test_planning_and_measuring_artifacts_import_neither_torch_nor_onnx():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnxruntime', 'matplotlib']));"
        "from litedetr_deploy.benchmark import contender, harness, latency, plan"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dry_run(litedetr, cache):
    done = litedetr(VARIANT, "--dry-run", "--backends", "onnxruntime-op,pytorch-graph", "--image-sizes", "256x256",
                    "--cache", cache.folder)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "ready" in done.output and "missing: it runs on cuda only" in done.output and "1 of 2" in done.output
    done = litedetr(VARIANT, "--dry-run", "--json", "--image-size", "256", "--cache", cache.folder)
    rows = json.loads(done.stdout)["plan"]
    assert [(row["backend"], row["image_size"]) for row in rows] == [
        (name, [256, 256]) for name in plan.DEFAULT_BACKENDS
    ]
    assert rows[0]["state"] == "ready" and rows[1]["state"] == "to be exported"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--threads", "two"], "--threads is 'two'"),
        (["--threads", "100000"], "--threads is 100000"),
        (["--image-sizes", "dynamic"], "image size is 'dynamic'"),
        (["--batch-sizes", ""], "--batch-sizes is ''"),
        (["--batch-sizes", "0"], "--batch-sizes is '0'"),
    ],
)
def test_wrong_use(litedetr, arguments, says):
    done = litedetr(VARIANT, "--dry-run", *arguments)
    assert done.exit_code == 2 and says in done.output


# Processes


def test_a_process_that_fails_says_why_in_one_line(cache, tmp_path):
    def engine(spec):
        return spec, tmp_path / "none.onnx", cache.reference_path(spec)

    detector = Detector(make_spec(), SimpleNamespace(engine=engine))
    with pytest.raises(LiteDetrError, match="none.onnx does not exist") as caught:
        detector.open()
    detector.close()
    assert "\n" not in str(caught.value)


# Checks


def test_pytorch_is_right_with_any_choice_of_queries(cache, weights):
    kept = Reference(cache.reference_path(make_spec()), weights)
    assert kept.check(kept.arrays, "fp32").passed and kept.gflops > 1
    other = kept.arrays[INDICES][:, ::-1]  # the worst first: PyTorch is asked for these
    check = kept.check(run_pytorch(weights.model, kept.arrays["images"], other), "fp32")
    assert [row.quantity for row in check.rows if not row.passed] == ["choice of queries"]


@pytest.mark.parametrize("name", [LOGITS, BOXES, "proposal_scores"])
@pytest.mark.parametrize("spoil", [lambda x: x + 0.02, lambda x: x * np.nan], ids=["biased", "nan"])
def test_wrong_outputs_fail(cache, name, spoil):
    kept = Reference(cache.reference_path(make_spec()))
    assert not kept.check(kept.arrays | {name: spoil(kept.arrays[name])}, "fp32").passed


def test_outputs_of_an_engine_are_compared_by_their_best_scores(cache):
    kept = Reference(cache.reference_path(make_spec()))
    raw = {name: kept.arrays[name] for name in (LOGITS, BOXES)}
    assert kept.check(raw, "fp32").passed
    assert not kept.check(raw | {LOGITS: raw[LOGITS] + 0.02}, "fp32").passed
    scores = np.sort(1 / (1 + np.exp(-raw[LOGITS].ravel().astype(np.float64))))[::-1][None, :300]
    assert kept.check({"scores": scores}, "fp32").passed
    assert not kept.check({"scores": scores * 0.98}, "fp32").passed


@pytest.mark.parametrize("backend, precision", [("pytorch-official", "fp32"), ("pytorch", "bf16")])
def test_pytorch_contenders_are_right(cache, weights, tmp_path, backend, precision):
    shutil.copytree(cache.folder, tmp_path, dirs_exist_ok=True)  # which gets the tolerances of the precision
    copy, spec = Cache(tmp_path), make_spec(backend, precision=precision, batch=2)
    engine = open_engine(*copy.engine(spec))
    assert copy.reference(spec).check(engine.outputs(), precision).passed


# Parts


@pytest.fixture(scope="module")
def graph(cache):
    return onnx.load(cache.model_path(make_spec()), load_external_data=False).graph


def test_every_node_has_a_part(graph):
    found = parts.parts_of_nodes(graph)
    attentions = [found[node.name] for node in graph.node if node.op_type == schema.KEY_AWARE]
    assert attentions == [parts.ENCODER] * 6 + [parts.DECODER] * 3
    assert {found[node.name] for node in graph.node if node.op_type == "InstanceNormalization"} == {parts.PROJECTIONS}
    assert {found[node.name] for node in graph.node if node.op_type == "TopK"} == {parts.SELECTION}
    assert sum(part == parts.OTHER for part in found.values()) <= 3  # the shape of the images


def test_nodes_that_an_engine_has_renamed_keep_their_parts(graph):
    known, wanted = parts.parts_of_values(graph), parts.parts_of_nodes(graph)
    changed = onnx.GraphProto()
    changed.CopyFrom(graph)
    for i, node in enumerate(changed.node):
        node.name = f"fused_{i}"
        node.input[:] = [f"weight_{i}" if name.startswith("detector.") else name for name in node.input]
    found = parts.parts_of_nodes(changed, known)
    assert list(found.values())[::-1] == [wanted[node.name] for node in graph.node]


def test_parts_of_a_profile_add_up():
    def event(name, start, duration, category="Node"):
        operator = {"a": "MatMul", "c": "Add"}.get(name[0], "Conv")
        return {"name": name, "ts": start, "dur": duration, "cat": category, "args": {"op_name": operator}}

    events = [
        event("model_run", 0, 100, "Session"), event("a_kernel_time", 10, 30), event("b_kernel_time", 50, 40),
        event("model_run", 200, 50, "Session"), event("a_kernel_time", 210, 30), event("unknown_kernel_time", 241, 5),
        event("c_kernel_time", 246, 2),
    ]  # fmt: skip
    first, second = runs = parts.parts_of_runs(events, {"a": parts.ENCODER, "b": parts.DECODER, "c": parts.ENCODER})
    assert first.parts == pytest.approx({parts.ENCODER: 30e-6, parts.DECODER: 40e-6, parts.OTHER: 30e-6})
    assert second.parts == pytest.approx({parts.ENCODER: 32e-6, parts.OTHER: 18e-6})
    assert first.encoder_operators == pytest.approx({"MatMul": 30e-6})
    assert second.encoder_operators == pytest.approx({"MatMul": 30e-6, "Add": 2e-6})
    middle = parts.Watched.median([*runs, second])
    assert middle.parts == pytest.approx(second.parts) and middle.encoder_operators == second.encoder_operators


@pytest.mark.parametrize("backend", ["onnxruntime-op", "openvino-op"])
def test_parts_of_a_call(cache, backend):
    pytest.importorskip(plan.BACKENDS[backend].engine)
    watched = open_engine(*cache.engine(make_spec(backend))).parts(3)
    found = watched.parts
    assert {parts.BACKBONE, parts.PROJECTIONS, parts.ENCODER, parts.SELECTION, parts.DECODER, parts.HEADS} <= set(found)
    assert all(seconds > 0 for seconds in found.values())
    assert watched.encoder_operators["KeyAwareDeformAttn"] > 0 and "Conv" not in watched.encoder_operators


def test_parts_add_up_to_the_whole_in_pytorch(cache, monkeypatch):
    """The clock moves by one at every look at it, which is at every border of two parts."""
    engine = open_engine(*cache.engine(make_spec("pytorch")))
    now = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    detector = engine._deployed.detector
    found = parts.torch_parts(detector, engine.call, 1)
    assert sum(found.values()) == next(now) - 1
    assert {parts.BACKBONE, parts.PROJECTIONS, parts.ENCODER, parts.SELECTION, parts.DECODER, parts.HEADS} <= set(found)
    assert not any(module._forward_hooks for module in detector.modules())


# Sensors


@pytest.fixture
def jetson(tmp_path):
    """The files of a Jetson's power monitor: 5 V x 2 A and, as a part of it, 5 V x 1 A."""
    files = {
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin\0",
        "sys/class/devfreq/17000000.gpu/cur_freq": "1300500000",
        "sys/class/thermal/thermal_zone0/temp": "51500",
        "sys/class/thermal/thermal_zone1/temp": "-256000",
        "sys/class/hwmon/hwmon4/oc1_event_cnt": "3",
    }
    for number, rail, milliamperes in ((1, "VDD_IN", 2000), (2, "VDD_CPU", 1000)):
        monitor = "sys/class/hwmon/hwmon3"
        files |= {f"{monitor}/in{number}_label": rail, f"{monitor}/in{number}_input": "5000",
                  f"{monitor}/curr{number}_input": str(milliamperes)}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_jetson_sensors(jetson):
    found = sensors.JetsonSensors(jetson)
    assert found.read() == sensors.Reading(10.0, 1300.5, 51.5, frozenset())
    (jetson / "sys/class/hwmon/hwmon4/oc1_event_cnt").write_text("4")
    assert found.read().throttling
    assert found.describe()["device"] == "NVIDIA Jetson AGX Orin"
    with pytest.raises(OSError):
        sensors.JetsonSensors(jetson / "sys")


def test_energy_is_power_by_time_of_an_image(jetson):
    def work():
        return 5, 2.0

    power = sensors.watch(sensors.JetsonSensors(jetson), work)
    assert power["watts"] == 10 and power["joules_per_image"] == 4 and power["throttling"] == []


def test_trtexec_is_read():
    text = (
        "[I] Latency: min = 4.1 ms, max = 5.2 ms, mean = 4.4 ms, median = 4.35 ms, percentile(90%) = 4.8 ms\n"
        "[I] GPU Compute Time: min = 3.1 ms, max = 4.2 ms, mean = 3.4 ms, median = 3.35 ms\n"
    )
    assert read_trtexec(text) == 4.35
    assert read_trtexec("&&&& FAILED") is None


# Whole runs


def run(litedetr, folder, output, *arguments):
    return litedetr(VARIANT, "--backends", "onnxruntime-op,pytorch-graph", "--image-size", "256", "--threads", "1",
                    "--seconds", "0", "--cache", folder, "--output", output, *arguments)  # fmt: skip


def test_a_run_from_end_to_end(litedetr, cache, tmp_path):
    done = run(litedetr, cache.folder, tmp_path / "latency")
    assert done.exit_code == 0, done.output
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", *([".png"] if drawn else [])]
    contents = json.loads((tmp_path / "latency.json").read_text())
    assert set(contents) == {"benchmark", "schema", "machine", "settings", "results"}
    assert {"cpu", "packages", "sources", "op_kernel", "date"} <= set(contents["machine"])
    measured, missing = contents["results"]
    assert (missing["status"], missing["backend"]) == ("missing", "pytorch-graph") and "cuda" in missing["trouble"]
    assert measured["status"] == "measured" and measured["calls"] == timing.FEWEST == len(measured["seconds"])
    assert 0 < measured["median_ms"] <= measured["p90_ms"] <= measured["p99_ms"]
    assert measured["images_per_second"] == pytest.approx(1e3 / measured["median_ms"])
    assert measured["encoder_ms"] == pytest.approx(measured["parts_ms"]["encoder"], abs=1e-3)
    assert {"MatMul", "KeyAwareDeformAttn"} <= set(measured["encoder_operators_ms"])
    assert measured["peak_memory_mib"] > 20 and measured["variant"].startswith(VARIANT) and measured["gflops"] > 1
    assert all(row["passed"] for row in measured["check"])
    text = (tmp_path / "latency.md").read_text()
    assert "## 256x256, batch 1, CPU, 1 thread" in text and "By part" in text and "by operator" in text


def test_a_wrong_artifact_is_refused(litedetr, cache, tmp_path):
    """One weight of the encoder is another: its outputs look the same to the eye."""
    model = onnx.load(cache.model_path(make_spec()))
    name = "detector.encoder.layers.3.self_attn.output_proj.weight"
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.2), name))
    onnx.save(model, tmp_path / "changed.onnx")
    done = litedetr(tmp_path / "changed.onnx", "--checkpoint", VARIANT, "--threads", "1", "--seconds", "0", "--cache",
                    cache.folder, "--output", tmp_path / "latency")  # fmt: skip
    assert done.exit_code == 1 and "it does not agree with PyTorch" in done.output
    assert done.stderr.startswith("warning: ") and "changed.onnx was not verified (" in done.stderr
    wrong = json.loads((tmp_path / "latency.json").read_text())["results"][0]
    assert wrong["status"] == "wrong" and "median_ms" not in wrong and not all(row["passed"] for row in wrong["check"])


# Going on


def test_nothing_to_measure_is_wrong_use(litedetr, cache):
    done = litedetr(VARIANT, "--backends", "pytorch-graph", "--image-sizes", "256x256", "--cache", cache.folder)
    assert done.exit_code == 2 and "cuda only" in done.output and "Nothing could be measured" in done.output


@pytest.fixture
def measured_batches(monkeypatch):
    """Replaces processes by a note of the batches that were measured; a batch in the list `stops` is interrupted."""
    noted, stops = [], []

    def open_(contender):
        if contender.subject.batch in stops:
            raise KeyboardInterrupt

    def time_(contender, cold=False):
        noted.append(contender.subject.batch)
        return 0.1, None

    monkeypatch.setattr(latency.Detector, "open", open_)
    monkeypatch.setattr(latency.Detector, "time", time_)
    monkeypatch.setattr(latency.Detector, "check", lambda contender, result: "")
    monkeypatch.setattr(latency.Detector, "memory", lambda contender: None)
    monkeypatch.setattr(latency.Detector, "parts", lambda contender, calls: None)
    monkeypatch.setattr(timing, "repetitions", lambda time_once, budget: 1)
    return noted, stops


def test_an_interrupted_run_resumes(litedetr, cache, tmp_path, measured_batches):
    noted, stops = measured_batches
    stops.append(3)
    output = tmp_path / "latency"
    interrupted = run(litedetr, cache.folder, output, "--batch-sizes", "1,2,3")
    assert interrupted.exit_code == 130 and "2 finished are kept" in interrupted.output
    assert [path.name for path in tmp_path.iterdir()] == ["latency.unfinished.jsonl"]
    stops.clear()
    done = run(litedetr, cache.folder, output, "--batch-sizes", "1,2,3")
    assert done.exit_code == 0 and noted == [1, 2, 3]
    results = json.loads(output.with_suffix(".json").read_text())["results"]
    assert [row["batch"] for row in results if row["status"] == "measured"] == [1, 2, 3]
    assert not list(tmp_path.glob("*unfinished*"))


def test_another_machine_begins_anew(litedetr, cache, tmp_path, measured_batches, monkeypatch):
    noted, stops = measured_batches
    stops.append(2)
    run(litedetr, cache.folder, tmp_path / "latency", "--batch-sizes", "1,2")
    stops.clear()
    machine = timing.machine([]) | {"cpu": "another"}
    monkeypatch.setattr(timing, "machine", lambda packages: machine)
    run(litedetr, cache.folder, tmp_path / "latency", "--batch-sizes", "1,2")
    assert noted == [1, 1, 2]


# Reports


def test_reports_have_power_trtexec_and_published_ap(tmp_path):
    power = {"watts": 30.0, "joules_per_image": 0.6, "clock_mhz": 1300.0, "lowest_clock_mhz": 900.0,
             "temperature_c": 61.5, "throttling": ["power cap"]}  # fmt: skip
    specs = [make_spec("tensorrt-op", model=model, device="cuda") for model in ("lite-dino-r50-h3l1-2+1x3", "dino-r50")]
    results = [
        harness.Result(spec.name, spec, harness.MEASURED, seconds=[0.02, 0.03], power=power,
                       figures={"trtexec_ms": 19.5, "gflops": gflops, "ap": ap})
        for spec, gflops, ap in zip(specs, (158.5, 243.9), (50.4, 50.7))
    ]  # fmt: skip
    spec = make_spec("tensorrt-gather", device="cuda")
    results.append(harness.Result(spec.name, spec, harness.FAILED, "no | memory"))
    machine = timing.machine([]) | {"device": "Jetson"}
    paths = latency.write_reports(results, machine, latency.as_dict(results, machine, {}), tmp_path / "v1.2")
    assert [path.name for path in paths][:2] == ["v1.2.json", "v1.2.md"]
    text = paths[1].read_text()
    for part in ("power cap", "19.5", "50.4", "failed: no \\| memory", "256x256, batch 1, CUDA", "61.5"):
        assert part in text
    row = json.loads(paths[0].read_text())["results"][0]
    assert row["power"] == power and row["trtexec_ms"] == 19.5 and row["median_ms"] == pytest.approx(25)
    if len(paths) == 3:
        assert paths[2].read_bytes().startswith(b"\x89PNG")
