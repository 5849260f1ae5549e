"""Recipes, and the trtexec script beside them."""

import inspect
import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

import litedetr_deploy as ld
from litedetr_deploy import cli
from litedetr_deploy.engine.recipe import read_recipe
from litedetr_deploy.export import limits

FOLDER = Path(__file__).parents[2] / "export"
RECIPES = sorted(FOLDER.glob("**/*.toml"))
EXPORT_OPTIONS = ("variant", "attention", "precision", "image_size", "outputs", "opset", "target")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    return lambda text: path.write_text(text) and path


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Call `litedetr build` with options; returns the result and what reaches the builder."""
    model = tmp_path / "model.onnx"
    model.write_bytes(b"model")

    def run(*options):
        calls = {}

        def build_engine(*arguments, **named):
            calls.update(inspect.signature(real).bind(*arguments, **named).arguments)
            raise ld.LiteDetrError("not built")

        real = ld.build_engine
        with monkeypatch.context() as patch:
            patch.setitem(vars(ld), "build_engine", build_engine)
            arguments = ["build", str(model), "-o", str(tmp_path / "model.plan"), *map(str, options)]
            return CliRunner().invoke(cli.app, arguments), calls

    return run


def test_there_is_one_recipe_a_target():
    assert [path.name for path in RECIPES] == [
        "cpu-fp32.toml", "cpu-int8.toml", "datacenter-fp16.toml", "orin-fp16.toml", "orin-int8.toml", "rtx-fp16.toml",
    ]  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_legal(path, built):
    options = read_recipe(path, "export", EXPORT_OPTIONS)
    assert "variant" not in options  # the checkpoint says it
    height, width = map(int, options["image_size"].split("x"))
    limits.check(
        options["attention"],
        options["precision"],
        (height, width),
        "detections",
        17,
        None,
        options.get("target", "gpu"),
    )
    assert path.stem.endswith(options["precision"])
    if path.stem.startswith("cpu"):
        return
    result, calls = built("--recipe", path)
    assert "not built" in result.stderr
    assert calls["backend"] == ("tensorrt-rtx" if path.stem.startswith("rtx") else "tensorrt")
    assert options["attention"] == ("gather" if path.stem.startswith("rtx") else "op")
    assert (calls["variant"], calls["precision"]) == (None, options["precision"])
    assert calls["options"].image_size == [(800, 1333)]


def test_the_command_line_counts_more(built, recipe):
    path = recipe(
        '[build]\nbackend = "tensorrt-rtx"\nbatch = "1,2,3"\ntf32 = true\ncompute_capability = ["8.6", "8.9"]\n'
    )
    _, calls = built("--recipe", path)
    options = calls["options"]
    assert (calls["backend"], options.batch, options.tf32) == ("tensorrt-rtx", [1, 2, 3], True)
    assert options.compute_capabilities == ["8.6", "8.9"]
    _, calls = built("--batch", "4", "--recipe", path, "--compute-capability", "12.0")
    assert (calls["backend"], calls["options"].batch) == ("tensorrt-rtx", [4, 4, 4])
    assert calls["options"].compute_capabilities == ["12.0"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[build\n", "is not TOML"),
        ("[deploy]\n", "has a table 'deploy'; its tables are export and build"),
        ("[export]\n", r"has no table \[build\]: it says nothing to `litedetr build`"),
        ("[build]\nbatches = 4\n", "the option 'batches'; it has backend, batch. Did you mean 'batch'?"),
    ],
)
def test_what_is_no_recipe(recipe, text, message):
    with pytest.raises(ld.LiteDetrError, match=message):
        read_recipe(recipe(text), "build", {"batch", "backend"})


def test_recipe_that_is_not_there(built, tmp_path):
    result, calls = built("--recipe", tmp_path / "none.toml")
    assert result.exit_code == 2 and not calls
    assert result.stderr.startswith("error: the recipe ") and "No such file" in result.stderr


def test_build_takes_what_export_knows_of_the_model(recipe):
    path = recipe('[export]\nvariant = "dino-r50"\nattention = "op"\nprecision = "fp16"\n[build]\nprecision = "fp32"\n')
    assert read_recipe(path, "build", {"variant", "precision"}) == {"variant": "dino-r50", "precision": "fp32"}
    assert read_recipe(path, "export", {"variant", "attention", "precision"})["precision"] == "fp16"


@pytest.fixture
def trtexec(tmp_path):
    """Run the script with a trtexec of a version; returns the finished process."""

    def run(version, *arguments, **environment):
        program = tmp_path / "trtexec"
        program.write_text(f'#!/bin/sh\necho "&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] # $*"\n')
        program.chmod(0o755)
        environment = os.environ | {"TRTEXEC": str(program), "PLUGIN": "/lib/plugins.so"} | environment
        return subprocess.run([FOLDER / "trtexec.sh", *arguments], env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    "version, flags, others",
    [
        ("100300", ["--stronglyTyped"], ["--noCudaGraph", "--noSpinWait", "--includeDataTransfers"]),
        ("101601", ["--stronglyTyped"], ["--noCudaGraph", "--noSpinWait", "--includeDataTransfers"]),
        ("110100", ["--noCudaGraph", "--noSpinWait", "--includeDataTransfers"], ["--stronglyTyped"]),
    ],
)
def test_trtexec_flags(trtexec, version, flags, others):
    done = trtexec(version, "model.onnx", "model.plan", "1,2,8", "--iterations=5", SIZE="640x512")
    assert done.returncode == 0, done.stderr
    printed, ran = done.stdout.splitlines()
    assert printed.split()[1:] == ran.split("# ")[1].split()
    given = printed.split()[1:]
    assert set(flags) <= set(given) and not set(others) & set(given)
    assert {"--onnx=model.onnx", "--saveEngine=model.plan", "--dynamicPlugins=/lib/plugins.so", "--iterations=5",
            "--minShapes=images:1x3x640x512,orig_target_sizes:1x2",
            "--optShapes=images:2x3x640x512,orig_target_sizes:2x2",
            "--maxShapes=images:8x3x640x512,orig_target_sizes:8x2"} <= set(given)  # fmt: skip


def test_trtexec_without_plugin_raw_and_masked(trtexec):
    done = trtexec("110100", "model.onnx", "model.plan", PLUGIN="", RAW="1", MASK="1", DRY_RUN="1")
    assert done.stdout.count("\n") == 1 and "--dynamicPlugins" not in done.stdout
    assert "--maxShapes=images:4x3x800x1333,pixel_mask:4x800x1333 " in done.stdout


@pytest.mark.parametrize(
    "version, message",
    [("80601", "of version 80601"), ("120000", "of version 120000"), ("", "does not say its version")],
)
def test_trtexec_of_unknown_versions(trtexec, version, message):
    done = trtexec(version, "model.onnx", "model.plan")
    assert done.returncode == 2 and message in done.stderr
