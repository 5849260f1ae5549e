"""The latency benchmark on a small detector: what it refuses to time, what it writes, and what it goes on from."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
import typer
from typer.testing import CliRunner

from litedetr_deploy.benchmark import latency, parts, plan, report, sensors, timing
from litedetr_deploy.benchmark.contender import Contender, Job, Worker, WorkerFailed, open_contender
from litedetr_deploy.benchmark.official import key_aware_deform_attn, ms_deform_attn
from litedetr_deploy.cli.latency import latency as command
from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.ops import reference, schema
from litedetr_deploy.verify.reference import BOXES, INDICES, LOGITS, Reference, Weights, run_pytorch

VARIANT, SIZE = "lite-dino-r26n", (256, 256)


def make_row(backend="onnxruntime-op", **changes):
    return plan.Row(**{"model": VARIANT, "backend": backend, "precision": "fp32", "batch": 1, "image_size": SIZE,
                       "device": "cpu", "threads": 1} | changes)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """With the small detector exported, and PyTorch's outputs."""
    cache = plan.Cache(tmp_path_factory.mktemp("cache"))
    latency.Preparation(cache, latency.Settings()).prepare(make_row())
    return cache


@pytest.fixture(scope="module")
def weights():
    return Weights(VARIANT)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(timing, "REST", 0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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


def test_a_plan_has_every_combination_and_groups_what_is_compared():
    rows = plan.make_plan([VARIANT, "dino-r50"], ["pytorch", "onnxruntime-op"], ["fp32", "fp16"], [1, 2],
                          [SIZE, (320, 256)], "cpu", [1, 2])  # fmt: skip
    assert len(rows) == len(set(rows)) == 2**6
    assert len(latency_groups(rows)) == 8
    on_gpu = plan.make_plan([VARIANT], ["pytorch"], ["fp32"], [1], [SIZE], "cuda", [1, 2])
    assert [row.threads for row in on_gpu] == [1]


def latency_groups(rows):
    return report.groups([latency.Result(row) for row in rows])


@pytest.mark.parametrize(
    "change, part",
    [
        ({"backends": ["onnx"]}, "'onnx'"),
        ({"precisions": ["fp8"]}, "'fp8'"),
        ({"device": "tpu"}, "'tpu'"),
        ({"batches": [0]}, "batch size is 0"),
        ({"models": ["lite-dino-r5"]}, "'lite-dino-r5'"),
        ({"models": ["missing.onnx"]}, "missing.onnx does not exist"),
        ({"image_sizes": [(32, 32)]}, "32x32"),
    ],
)
def test_a_plan_refuses_what_does_not_exist(change, part):
    wanted = {"models": [VARIANT], "backends": ["pytorch"], "precisions": ["fp32"], "batches": [1],
              "image_sizes": [SIZE], "device": "cpu", "threads": [1]}  # fmt: skip
    with pytest.raises(LiteDetrError, match=part):
        plan.make_plan(**wanted | change)


def test_an_artifact_keeps_its_own_attention_precision_and_size(cache):
    file = str(cache.model(make_row()))
    rows = plan.make_plan([file], ["pytorch"], ["fp16"], [1], [(640, 640), (800, 1333)], "cpu", [1])
    assert rows == [make_row(model=file)]
    assert "--checkpoint" in plan.why_missing(rows[0], cache)
    assert not plan.why_missing(rows[0], cache, unchecked=True)
    known = plan.Cache(cache.folder, VARIANT)  # its weights are those whose outputs are there
    assert not plan.why_missing(rows[0], known) and known.reference(rows[0]) == cache.reference(make_row())


def test_what_is_missing_is_said(cache, monkeypatch):
    find_spec = importlib.util.find_spec
    absent = {"torch", "openvino"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    assert not plan.why_missing(make_row(), cache)  # exported, and with PyTorch's outputs
    assert "torch is not installed to export it" in plan.why_missing(make_row("onnxruntime-gather"), cache)
    assert "openvino is not installed" in plan.why_missing(make_row("openvino-gather"), cache)
    assert "cuda only" in plan.why_missing(make_row("pytorch-graph"), cache)
    assert "fp32 only" in plan.why_missing(make_row("openvino-gather", precision="fp16"), cache)


def test_planning_and_measuring_artifacts_import_neither_torch_nor_onnx():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnxruntime', 'matplotlib']));"
        "from litedetr_deploy.benchmark import contender, latency, plan, report"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dry_run(litedetr, cache):
    done = litedetr(VARIANT, "--dry-run", "--backends", "onnxruntime-op,pytorch-graph", "--image-sizes", "256x256",
                    "--cache", cache.folder)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "ready" in done.output and "missing: it runs on cuda only" in done.output and "1 of 2" in done.output


@pytest.mark.parametrize("arguments", [["--threads", "two"], ["--image-sizes", "dynamic"], ["--batch-sizes", ""]])
def test_wrong_use(litedetr, arguments):
    done = litedetr(VARIANT, "--dry-run", *arguments)
    assert done.exit_code == 2 and arguments[0] in done.output


# Timing


class Sleeper(Contender):
    def __init__(self, seconds, batch=1, log=None):
        self.row, self.seconds, self.log = make_row(batch=batch), seconds, log if log is not None else []

    def call(self):
        self.log.append(self.seconds)
        time.sleep(self.seconds)


def test_a_call_of_known_duration():
    sleeper = Sleeper(0.05, batch=3)
    assert 0.05 <= min(sleeper.time()[0] for _ in range(5)) < 0.06
    images, seconds = sleeper.keep_running(0.12)
    assert images == 9 and seconds >= 0.15


def test_contenders_are_timed_in_turns():
    log = []
    results = {name: latency.Result(make_row(backend)) for name, backend in (("a", "pytorch"), ("b", "onnxruntime-op"))}
    workers = {"a": Sleeper(0.31, log=log), "b": Sleeper(0.32, log=log)}  # long enough to need no untimed call
    latency._time_in_turns(results, workers, 0.0, lambda stage: None)
    assert [len(result.seconds) for result in results.values()] == [timing.FEWEST] * 2
    assert log[-6:] == [0.31, 0.32] * 3
    assert 0.31 <= results["a"].median < results["b"].median


def test_a_contender_that_fails_while_timed_leaves_the_others():
    class Broken(Sleeper):
        def time(self):
            raise WorkerFailed("it broke")

    results = {name: latency.Result(make_row()) for name in "ab"}
    failed = results["a"]
    latency._time_in_turns(results, {"a": Broken(0), "b": Sleeper(0.001)}, 0.0, lambda stage: None)
    assert list(results) == ["b"] and failed.trouble == "it broke" and failed.status == latency.FAILED


def test_a_process_that_fails_says_why_in_one_line(cache, tmp_path):
    row = make_row()
    with Worker(Job(row, tmp_path / "none.onnx", cache.reference(row))) as worker:
        with pytest.raises(WorkerFailed, match="none.onnx does not exist") as caught:
            worker.ready()
    assert "\n" not in str(caught.value)


# Checks


def test_pytorch_is_right_with_any_choice_of_queries(cache, weights):
    kept = Reference(cache.reference(make_row()), weights)
    assert kept.check(kept.arrays, "fp32").passed and kept.gflops > 1
    other = kept.arrays[INDICES][:, ::-1]  # the worst first: PyTorch is asked for these
    check = kept.check(run_pytorch(weights.model, kept.arrays["images"], other), "fp32")
    assert [row["quantity"] for row in check.rows if not row["passed"]] == ["choice of queries"]


@pytest.mark.parametrize("name", [LOGITS, BOXES, "proposal_scores"])
@pytest.mark.parametrize("spoil", [lambda x: x + 0.02, lambda x: x * np.nan], ids=["biased", "nan"])
def test_wrong_outputs_fail(cache, name, spoil):
    kept = Reference(cache.reference(make_row()))
    assert not kept.check(kept.arrays | {name: spoil(kept.arrays[name])}, "fp32").passed


def test_outputs_of_an_engine_are_compared_by_their_best_scores(cache):
    kept = Reference(cache.reference(make_row()))
    raw = {name: kept.arrays[name] for name in (LOGITS, BOXES)}
    assert kept.check(raw, "fp32").passed
    assert not kept.check(raw | {LOGITS: raw[LOGITS] + 0.02}, "fp32").passed
    scores = np.sort(1 / (1 + np.exp(-raw[LOGITS].ravel().astype(np.float64))))[::-1][None, :300]
    assert kept.check({"scores": scores}, "fp32").passed
    assert not kept.check({"scores": scores * 0.98}, "fp32").passed


@pytest.mark.parametrize("backend, precision", [("pytorch-official", "fp32"), ("pytorch", "bf16")])
def test_pytorch_contenders_are_right(cache, weights, tmp_path, backend, precision):
    shutil.copytree(cache.folder, tmp_path, dirs_exist_ok=True)  # which gets the tolerances of the precision
    preparation = latency.Preparation(plan.Cache(tmp_path), latency.Settings())
    row = make_row(backend, precision=precision, batch=2)
    contender = open_contender(preparation.job(row))
    assert preparation.reference(row).check(contender.outputs(), precision).passed


# Parts


@pytest.fixture(scope="module")
def graph(cache):
    return onnx.load(cache.model(make_row()), load_external_data=False).graph


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


def test_parts_add_up_to_the_whole_in_onnxruntime(cache):
    contender = open_contender(latency.Preparation(cache, latency.Settings()).job(make_row()))
    fastest = min(contender.time()[0] for _ in range(5))
    start = time.perf_counter()
    watched = contender.parts(5)
    found = watched.parts
    elapsed = time.perf_counter() - start
    fastest = min([fastest, *(contender.time()[0] for _ in range(5))])
    assert {parts.BACKBONE, parts.PROJECTIONS, parts.ENCODER, parts.SELECTION, parts.DECODER, parts.HEADS} <= set(found)
    assert found[parts.BACKBONE] > found[parts.PROJECTIONS]  # it renames the convolutions
    assert found.get(parts.OTHER, 0) < 0.25 * sum(found.values())
    # Other calls than those that were timed whole, on a machine that may be busy: a third of five calls bounds medians.
    assert 0.5 * fastest < sum(found.values()) < elapsed / 3
    assert watched.encoder_operators["KeyAwareDeformAttn"] > 0
    assert sum(watched.encoder_operators.values()) == pytest.approx(found[parts.ENCODER], rel=0.5)  # medians, both


def test_parts_add_up_to_the_whole_in_pytorch(cache):
    contender = open_contender(latency.Preparation(cache, latency.Settings()).job(make_row("pytorch")))
    contender.call()
    whole = []

    def timed():
        start = time.perf_counter()
        contender.call()
        whole.append(time.perf_counter() - start)

    detector = contender._deployed.detector
    found = parts.torch_parts(detector, timed, 1)
    assert sum(found.values()) == pytest.approx(whole[0], rel=0.1)
    assert found[parts.ENCODER] > found[parts.HEADS] > 0
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
        time.sleep(3 * sensors.PERIOD)
        return 5, 2.0

    power = sensors.watch(sensors.JetsonSensors(jetson), work)
    assert power["watts"] == 10 and power["joules_per_image"] == 4 and power["throttling"] == []


def test_trtexec_is_read():
    text = (
        "[I] Latency: min = 4.1 ms, max = 5.2 ms, mean = 4.4 ms, median = 4.35 ms, percentile(90%) = 4.8 ms\n"
        "[I] GPU Compute Time: min = 3.1 ms, max = 4.2 ms, mean = 3.4 ms, median = 3.35 ms\n"
    )
    assert latency.read_trtexec(text) == 4.35
    assert latency.read_trtexec("&&&& FAILED") is None


# Whole runs


def run(litedetr, folder, output, *arguments):
    return litedetr(VARIANT, "--backends", "onnxruntime-op,pytorch-graph", "--image-sizes", "256x256", "--threads", "1",
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
    model = onnx.load(cache.model(make_row()))
    name = "detector.encoder.layers.3.self_attn.output_proj.weight"
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.2), name))
    onnx.save(model, tmp_path / "changed.onnx")
    done = litedetr(tmp_path / "changed.onnx", "--checkpoint", VARIANT, "--threads", "1", "--seconds", "0", "--cache",
                    cache.folder, "--output", tmp_path / "latency")  # fmt: skip
    assert done.exit_code == 1 and "differ from PyTorch's" in done.output
    wrong = json.loads((tmp_path / "latency.json").read_text())["results"][0]
    assert wrong["status"] == "wrong" and "median_ms" not in wrong and not all(row["passed"] for row in wrong["check"])


# Going on


def test_nothing_to_measure_is_wrong_use(litedetr, cache):
    done = litedetr(VARIANT, "--backends", "pytorch-graph", "--image-sizes", "256x256", "--cache", cache.folder)
    assert done.exit_code == 2 and "cuda only" in done.output and "Nothing could be measured" in done.output


@pytest.fixture
def measured_rows(monkeypatch):
    """Replaces measuring by a note of what was measured; raises KeyboardInterrupt at what is in the list `stops`."""
    noted, stops = [], []

    def measure(rows, *arguments):
        for row in rows:
            if row.batch in stops:
                raise KeyboardInterrupt
            noted.append(row.batch)
        return [latency.Result(row, latency.MEASURED, seconds=[0.1, 0.2, 0.3], parts={"encoder": 0.1}) for row in rows]

    monkeypatch.setattr(latency, "_measure_together", measure)
    return noted, stops


def test_an_interrupted_run_goes_on(litedetr, cache, tmp_path, measured_rows, monkeypatch):
    noted, stops = measured_rows
    stops.append(3)
    output = tmp_path / "latency"
    interrupted = run(litedetr, cache.folder, output, "--batch-sizes", "1,2,3")
    assert interrupted.exit_code == 130 and "2 finished are kept" in interrupted.output
    assert [path.name for path in tmp_path.iterdir()] == ["latency.unfinished.json"]
    stops.clear()
    done = run(litedetr, cache.folder, output, "--batch-sizes", "1,2,3")
    assert done.exit_code == 0 and noted == [1, 2, 3]
    results = json.loads(output.with_suffix(".json").read_text())["results"]
    assert [row["batch"] for row in results if row["status"] == "measured"] == [1, 2, 3]
    assert not list(tmp_path.glob("*unfinished*"))


def test_another_machine_begins_anew(litedetr, cache, tmp_path, measured_rows, monkeypatch):
    noted, stops = measured_rows
    stops.append(2)
    run(litedetr, cache.folder, tmp_path / "latency", "--batch-sizes", "1,2")
    stops.clear()
    machine = timing.machine([]) | {"cpu": "another"}
    monkeypatch.setattr(timing, "machine", lambda packages: machine)
    run(litedetr, cache.folder, tmp_path / "latency", "--batch-sizes", "1,2")
    assert noted == [1, 1, 2]


def test_a_result_outlives_its_file(tmp_path):
    kept = latency.Kept(tmp_path / "latency", {"cpu": "x"})
    result = latency.Result(make_row(), latency.MEASURED, seconds=[0.5], parts={"encoder": 0.25}, gflops=1.5)
    kept.add(result)
    again = latency.Kept(tmp_path / "latency", {"cpu": "x"})
    assert again.get(make_row()) == result
    assert again.get(dataclasses.replace(make_row(), batch=2)) is None


# Reports


def test_reports_have_power_trtexec_and_published_ap(tmp_path):
    power = {"watts": 30.0, "joules_per_image": 0.6, "clock_mhz": 1300.0, "lowest_clock_mhz": 900.0,
             "temperature_c": 61.5, "throttling": ["power cap"]}  # fmt: skip
    results = [
        latency.Result(make_row("tensorrt-op", model=model, device="cuda"), latency.MEASURED, seconds=[0.02, 0.03],
                       power=power, trtexec_ms=19.5, gflops=gflops, ap=ap)
        for model, gflops, ap in (("lite-dino-r50-h3l1-2+1x3", 158.5, 50.4), ("dino-r50", 243.9, 50.7))
    ] + [latency.Result(make_row("tensorrt-gather", device="cuda"), latency.FAILED, "no | memory")]  # fmt: skip
    machine = timing.machine([]) | {"device": "Jetson"}
    paths = report.write_reports(results, machine, {}, tmp_path / "v1.2")
    assert [path.name for path in paths][:2] == ["v1.2.json", "v1.2.md"]
    text = paths[1].read_text()
    for part in ("power cap", "19.5", "50.4", "failed: no \\| memory", "256x256, batch 1, CUDA", "61.5"):
        assert part in text
    row = json.loads(paths[0].read_text())["results"][0]
    assert row["power"] == power and row["trtexec_ms"] == 19.5 and row["median_ms"] == pytest.approx(25)
    if len(paths) == 3:
        assert paths[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "number, text", [(None, "-"), (0.0, "0"), (0.01234, "0.0123"), (56.78, "56.8"), (1234.5, "1234")]
)
def test_three_digits(number, text):
    assert report.three_digits(number) == text
