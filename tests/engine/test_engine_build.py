"""Engines that TensorRT-RTX builds here, without a GPU."""

import _thread
import json
import time

import pytest

import litedetr_deploy as ld
from litedetr_deploy.engine import api
from litedetr_deploy.engine.build import build_engine
from litedetr_deploy.errors import CheckFailed
from litedetr_deploy.runtime.tensorrt import read_record, record_path, sha256

from ..runtime.tiny_artifact import save_detector, save_with_attention_op, seal
from .graphs import save_grid_sample, save_half


@pytest.fixture
def build(rtx, tmp_path):
    """Build with TensorRT-RTX for one compute capability."""

    def build(model, **options):
        options = {"compute_capabilities": ["8.6"]} | options
        return build_engine(model, tmp_path / "model.plan", backend="tensorrt-rtx", **options)

    return build


@pytest.mark.slow
def test_weights_become_an_engine_for_two_compute_capabilities(build, tmp_path):
    model = ld.load_model(variant="lite-dino-r26n", encoder_layers=1, num_expansion=1, decoder_layers=1)
    report = build(model, image_size=[(256, 256)], compute_capabilities=["8.6", "12.0"], verify=False)
    assert report.passed and report.metadata["attention"] == "gather"
    assert report.compute_capabilities == ["8.6", "12.0"]
    assert report.shapes == {
        "images": [(n, 3, 256, 256) for n in (1, 1, 4)],
        "orig_target_sizes": [(1, 2), (1, 2), (4, 2)],
    }
    assert report.verdict.skipped == report.not_inspected == "no GPU here"
    assert (tmp_path / "model.plan").stat().st_size == report.size_bytes > 1e6
    assert {file.name for file in tmp_path.iterdir()} == {"model.plan", "model.plan.json"}


def test_record(build, tmp_path):
    stages = []
    report = build(
        save_detector(tmp_path / "model.onnx"),
        batch=(1, 2, 3),
        progress=lambda stage, done=0, total=None: stages.append((stage, done)),
    )
    record = read_record(tmp_path / "model.plan")
    assert record == json.loads(json.dumps(report.to_dict()))
    assert record["sha256"] == sha256(tmp_path / "model.plan")
    assert record["onnx"] == {"name": "model.onnx", "sha256": sha256(tmp_path / "model.onnx")}
    assert record["metadata"]["class_names"][1] == "person" and record["plugin"] is None
    assert record["shapes"]["images"] == [[n, 3, 64, 96] for n in (1, 2, 3)]
    assert record["tensors"]["images"] == {"type": "FLOAT", "shape": [-1, 3, 64, 96]}
    assert record["tensors"]["labels"] == {"type": "INT64", "shape": [-1, 3]} and len(record["tensors"]) == 5
    done = [part for stage, part in stages if stage == "build the engine"]
    assert done == sorted(done) and 0 < done[-1] <= 1


def test_dynamic_size(build, tmp_path):
    model = save_detector(tmp_path / "model.onnx", size=None, pixel_mask=True)
    report = build(model, image_size=[(64, 64), (64, 96), (128, 96)], batch=(1, 1, 2))
    assert report.shapes["images"] == [(1, 3, 64, 64), (1, 3, 64, 96), (2, 3, 128, 96)]
    assert report.shapes["pixel_mask"] == [(1, 64, 64), (1, 64, 96), (2, 128, 96)]


def test_options_reach_tensorrt(build, tmp_path):
    report = build(save_detector(tmp_path / "model.onnx"), workspace=0.5, optimization_level=1, tf32=True)
    assert (report.options["workspace"], report.options["optimization_level"], report.options["tf32"]) == (0.5, 1, True)


def test_half_layers_are_counted(build, tmp_path):
    report = build(save_half(tmp_path / "model.onnx", precision="fp16"))
    assert report.passed and report.network_types["fp16"] >= 2 and report.network_types["int8"] == 0


def test_lost_precision_is_a_failed_check(build, tmp_path):
    with pytest.raises(CheckFailed, match="its precision is int8, and tensorrt-rtx .* reads no layer of that type"):
        build(save_half(tmp_path / "model.onnx", precision="int8"))
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_an_engine_without_its_half_layers_does_not_pass(build, tmp_path):
    report = build(save_half(tmp_path / "model.onnx", precision="fp16"))
    report.layer_types = {"fp16": 3, "bf16": 0, "int8": 0}
    assert report.passed
    report.layer_types["fp16"] = 0
    assert not report.passed and report.to_dict()["passed"] is False


def test_fused_ops_are_refused(build, tmp_path):
    with pytest.raises(ld.LiteDetrError, match="has no plugins.*--attention gather.*its checkpoint"):
        build(save_with_attention_op(tmp_path / "model.onnx"))


def test_grid_sample_is_refused_unless_allowed(build, tmp_path):
    model = save_grid_sample(tmp_path / "model.onnx")
    with pytest.raises(ld.LiteDetrError, match="GridSample nodes wrong.*--attention gather.*--allow-known-bad"):
        build(model)
    report = build(model, allow_known_bad=True)
    assert len(report.warnings) == 1 and "GridSample" in report.warnings[0]


def test_misread_grid_sample_is_refused_always(build, tmp_path):
    with pytest.raises(ld.LiteDetrError, match="opset 20.*nearest"):
        build(save_grid_sample(tmp_path / "model.onnx", opset=20), allow_known_bad=True)


class CtrlC:
    """Presses Ctrl-C once, when a build reports its first step."""

    def __init__(self):
        self.pressed = False

    def __call__(self, stage, done=0, total=None):
        if done and not self.pressed:
            self.pressed = True
            _thread.interrupt_main()
            time.sleep(1)  # so small a graph would be built before the main thread can say stop


def test_ctrl_c_cancels_and_leaves_nothing(build, tmp_path):
    model = save_detector(tmp_path / "model.onnx")
    with pytest.raises(KeyboardInterrupt):
        build(model, progress=CtrlC())
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_tensorrt_stops_when_it_is_cancelled(rtx, tmp_path):
    builder = api.Builder("tensorrt-rtx")
    builder.parse(save_detector(tmp_path / "model.onnx"))
    shapes = {"images": [(1, 3, 64, 96)] * 3, "orig_target_sizes": [(1, 2)] * 3}
    press = CtrlC()
    with pytest.raises(KeyboardInterrupt):
        builder.build(shapes, api.Options(("8.6",)), lambda done: press("", done))
    assert "cancel" in builder.logger.errors[-1].lower()


@pytest.mark.parametrize(
    "content, message", [(b"no model", "not an ONNX model, or a damaged one"), (None, "does not exist")]
)
def test_unreadable_model(build, tmp_path, content, message):
    model = tmp_path / "model.onnx"
    if content is not None:
        model.write_bytes(content)
    with pytest.raises(ld.LiteDetrError, match=message):
        build(model)


def test_model_of_something_else(build, tmp_path):
    import onnx

    proto = onnx.load(save_half(tmp_path / "model.onnx"))
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ld.LiteDetrError, match="not made by `litedetr export`"):
        build(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"compute_capabilities": ["7.0"]}, "compute capability 7.0 .* these are 7.5, 8.0"),
        ({"timing_cache": "cache"}, "timing_cache is given, and is not supported by .*choose backend 'tensorrt'"),
        ({"version_compatible": True}, "version_compatible is given"),
        ({"hardware_compatibility": "ampere+"}, "hardware_compatibility is given"),
        ({"hardware_compatibility": "all"}, "it must be 'none' or 'ampere\\+'"),
        ({"optimization_level": 6}, "optimization_level is 6; it must be 0 to 5"),
        ({"workspace": 0}, "workspace is 0; it must be more than 0 GiB"),
        ({"batch": (2, 1, 4)}, "the batch is 2,1,4"),
        ({"image_size": [(32, 96)]}, "no side may be smaller than 64"),
        ({"image_size": [(64, 64)]}, "fixed at 64x96"),
    ],
)
def test_options_that_are_refused(build, tmp_path, options, message):
    with pytest.raises(ld.LiteDetrError, match=message):
        build(save_detector(tmp_path / "model.onnx"), **options)


def rewrite(path):
    """Change a model after it was verified, as an optimiser of others does; its metadata stays."""
    import onnx

    proto = onnx.load(path)
    proto.graph.doc_string = "optimised"
    onnx.save(proto, path)


@pytest.mark.parametrize(
    "verification, changed, why",
    [
        ({"verdict": "failed", "why": "boxes differ by 3.0e+02"}, False, r"failed its verification \(boxes differ by"),
        ({"verdict": "cannot tell", "why": "all is 0"}, False, "was not verified: .* cannot tell"),
        ({}, False, "was not verified"),
        ({"verdict": "verified"}, True, "was rewritten after it was verified"),
    ],
)
def test_a_model_that_is_not_verified_is_refused_unless_allowed(build, tmp_path, verification, changed, why):
    model = save_detector(tmp_path / "model.onnx", verification=verification)
    if changed:
        rewrite(model)
    with pytest.raises(ld.LiteDetrError, match=f"model.onnx {why}.*--allow-unverified"):
        build(model)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    report = build(model, allow_unverified=True)
    assert len(report.warnings) == 1 and "model.onnx" in report.warnings[0]
    # The engine is no better than what it was built from.
    written = read_record(tmp_path / "model.plan")["metadata"]["verification"]
    assert written["verdict"] == (verification.get("verdict", "not verified") if not changed else "not verified")
    assert "the ONNX model that it was built from" in written["why"]


def test_an_engine_says_itself_what_is_proven_of_it(build, tmp_path):
    build(save_detector(tmp_path / "model.onnx"))
    written = read_record(tmp_path / "model.plan")["metadata"]["verification"]
    assert (written["verdict"], written["why"]) == ("not verified", "no GPU here")


def test_a_real_engine_is_taken_for_one_without_its_record(build, tmp_path):
    build(save_detector(tmp_path / "model.onnx"))
    record_path(tmp_path / "model.plan").unlink()
    assert read_record(tmp_path / "model.plan") == {}


def test_the_op_version_of_the_file_counts(build, tmp_path):
    import onnx

    path = save_detector(tmp_path / "model.onnx")
    proto = onnx.load(path)
    [ours] = [opset for opset in proto.opset_import if opset.domain == "litedetr"]
    ours.version = 99
    onnx.save(proto, path)
    with pytest.raises(ld.LiteDetrError, match="imports version 99 of the opset 'litedetr'"):
        build(path)


def test_int8_for_cpus_is_no_model_for_an_engine(build, tmp_path):
    import onnx

    proto = onnx.load(save_detector(tmp_path / "model.onnx"))
    seal(proto, tmp_path / "model.onnx", {"attention": "gather", "precision": "int8", "target": "cpu"})
    with pytest.raises(ld.LiteDetrError, match="exported in INT8 for CPUs.*without `--target cpu`"):
        build(tmp_path / "model.onnx", allow_unverified=True)


def test_metadata_that_lacks_what_a_build_needs(build, tmp_path):
    import onnx

    proto = onnx.load(save_detector(tmp_path / "model.onnx"))
    seal(proto, tmp_path / "model.onnx", {"attention": "gather"})
    with pytest.raises(ld.LiteDetrError, match="gives None as precision; it must be 'fp32'"):
        build(tmp_path / "model.onnx")


def test_wrong_names(tmp_path):
    with pytest.raises(ld.LiteDetrError, match="'tensorrt' or 'tensorrt-rtx'"):
        ld.build_engine("model.onnx", tmp_path / "model.plan", backend="tensor")
    with pytest.raises(ld.LiteDetrError, match=r"must end in \.plan or \.engine"):
        ld.build_engine("model.onnx", tmp_path / "model.trt")


def test_folder_that_is_not_there(rtx, tmp_path):
    model = save_detector(tmp_path / "model.onnx")
    with pytest.raises(ld.LiteDetrError, match="cannot be written: No such file or directory"):
        build_engine(model, tmp_path / "none" / "model.plan", backend="tensorrt-rtx")
