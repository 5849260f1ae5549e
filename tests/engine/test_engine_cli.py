"""`litedetr build`."""

import inspect
import json

import pytest
from typer.testing import CliRunner

import litedetr_deploy as ld
from litedetr_deploy import cli
from litedetr_deploy.engine.api import Options
from litedetr_deploy.engine.build import EngineReport
from litedetr_deploy.verify.verdict import Verdict

from ..runtime.tiny_artifact import METADATA, save_detector


def verdict(*differences):
    made = Verdict("the ONNX model", "the engine")
    for i, difference in enumerate(differences):
        made.add(f"64x96, image {i + 1}", "scores by rank", difference, 1e-2)
    return made


@pytest.fixture
def litedetr():
    return lambda *arguments: CliRunner().invoke(cli.app, ["build", *map(str, arguments)])


@pytest.fixture
def stand_in(monkeypatch, tmp_path, litedetr):
    """Call `litedetr build` on a builder that reports what it is told; returns the result and its arguments."""
    model = save_detector(tmp_path / "model.onnx")

    def run(*options, **report):
        calls, signature = {}, inspect.signature(ld.build_engine)

        def build_engine(*arguments, **named):
            calls.update(signature.bind(*arguments, **named).arguments)
            calls.pop("progress")("build the engine", 0.5, 1)
            fields = {
                "path": str(calls["path"]),
                "backend": "tensorrt",
                "version": "10.15.1",
                "onnx": {},
                "metadata": METADATA,
                "shapes": {"images": [(1, 3, 64, 96)] * 3},
                "options": {},
                "warnings": [],
                "size_bytes": 2_500_000,
                "gpu": "Test GPU",
                "seconds": 12.4,
                "layer_types": {"fp16": 2, "bf16": 0, "int8": 0},
            }
            return EngineReport(**fields | report)

        monkeypatch.setitem(vars(ld), "build_engine", build_engine)
        return litedetr(model, "-o", tmp_path / "model.plan", *options), calls

    return run


def test_arguments_reach_the_builder(stand_in, tmp_path):
    result, calls = stand_in(
        "--backend", "tensorrt", "--batch", "1,2,8", "--image-size", "64x64,64x96,128x96", "--precision", "fp16",
        "--timing-cache", tmp_path / "cache", "--workspace", "2", "--optimization-level", "4", "--version-compatible",
        "--hardware-compatibility", "ampere+", "--tf32", "--allow-known-bad", "--allow-unverified",
        "--no-verify", "--variant", "dino-r50", "--compute-capability", "8.6", "--compute-capability", "8.9",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert calls.pop("options") == Options(
        ["8.6", "8.9"], tmp_path / "cache", 2.0, 4, True, "ampere+", True, [1, 2, 8], [(64, 64), (64, 96), (128, 96)]
    )
    assert calls == {
        "model": str(tmp_path / "model.onnx"), "path": tmp_path / "model.plan", "backend": "tensorrt",
        "precision": "fp16", "variant": "dino-r50", "force_variant": False, "allow_known_bad": True,
        "allow_unverified": True, "verify": False, "images": None,
    }  # fmt: skip


def test_summary(stand_in):
    result, calls = stand_in("--batch", "2", verdict=verdict(2e-5), warnings=["tensorrt 10.15.1: beware."])
    assert result.exit_code == 0, result.stderr
    assert calls["options"].batch == [2, 2, 2] and calls["options"].image_size is None and calls["verify"] is True
    assert "warning: tensorrt 10.15.1: beware." in result.stdout
    assert "images: 1x3x64x96 to 1x3x64x96" in result.stdout and "layers: 2 fp16, 0 bf16, 0 int8" in result.stdout
    made, last = result.stdout.splitlines()[-2:]
    assert "2.5 MB, tensorrt 10.15.1 for Test GPU, fp32, made in 12 s" in made
    assert last.startswith("verified against the ONNX model; the worst figure is 0% of its tolerance")
    assert "largest difference" not in result.stdout
    assert "build the engine" in result.stderr


def test_failed_verification_exits_with_1(stand_in):
    result, _ = stand_in(verdict=verdict(2e-5, 0.5))
    assert result.exit_code == 1 and "VERIFICATION FAILED against the ONNX model" in result.stdout
    assert "largest difference" in result.stdout and "64x96, image 2" in result.stdout


def test_the_table_on_demand(stand_in):
    result, _ = stand_in("--verbose", verdict=verdict(2e-5))
    assert "largest difference" in result.stdout and "2.0e-05" in result.stdout


def test_lost_half_layers_exit_with_1(stand_in):
    lost = {"metadata": METADATA | {"precision": "int8"}, "verdict": verdict(2e-5)}
    result, _ = stand_in(**lost)
    assert result.exit_code == 1 and "CHECK FAILED: the graph's precision is int8" in result.stdout


def test_without_a_gpu(stand_in):
    result, _ = stand_in(
        layer_types=None,
        not_inspected="no GPU here",
        verdict=Verdict(skipped="no GPU here"),
        gpu=None,
        compute_capabilities=["8.6"],
    )
    assert result.exit_code == 0
    assert "for compute capability 8.6" in result.stdout
    assert result.stdout.splitlines()[-1] == "not verified: no GPU here"


def test_json_is_all_there_is_on_stdout(stand_in):
    result, _ = stand_in("--json", verdict=verdict(2e-5, 0.5))
    assert result.exit_code == 1 and json.loads(result.stdout)["verdict"]["verdict"] == "failed"


def test_real_build(rtx, litedetr, tmp_path):
    model = save_detector(tmp_path / "model.onnx")
    result = litedetr(model, "-o", tmp_path / "model.plan", "--backend", "tensorrt-rtx", "--compute-capability", "8.6")
    assert result.exit_code == 0, result.stderr
    assert "not verified: no GPU here" in result.stdout and (tmp_path / "model.plan.json").is_file()


@pytest.mark.parametrize(
    "options, message",
    [
        (("--batch", "many"), "the batch is 'many'"),
        (("--image-size", "big"), "The image size is 'big'"),
        (("--image-size", "dynamic"), "here it must be known"),
        (("--backend", "openvino"), "backend is 'openvino'"),
        (("--backend", "tensort"), "Did you mean 'tensorrt'?"),
        (("--images", "none.jpg"), "none.jpg does not exist"),
    ],
)
def test_wrong_use_exits_with_2(litedetr, tmp_path, options, message):
    result = litedetr(save_detector(tmp_path / "model.onnx"), "-o", tmp_path / "model.plan", *options)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.startswith("error: ")
    assert result.stdout == "" and [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_model_that_is_not_there(litedetr, tmp_path):
    for name in ("gone.onnx", "gone.pth"):
        result = litedetr(tmp_path / name, "-o", tmp_path / "model.plan")
        assert result.exit_code == 2 and f"{name} does not exist" in result.stderr
