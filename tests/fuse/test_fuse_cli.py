"""litedetr fuse: exit statuses, and what is said."""

import json

import numpy as np
import pytest

from litedetr_deploy.cli import main

from . import attention


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return attention.export(tmp_path_factory.mktemp("fuse") / "original.onnx", batch=True)


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return ended.value.code or 0


def test_it_says_what_it_made(original, tmp_path, capsys):
    assert run("fuse", original, "-o", tmp_path / "fused.onnx", "--verbose") == 0
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'fused.onnx'}: 0.0 MB, 1 deformable attention as the op, made in " in out
    assert "verified against the original in ONNX Runtime; the worst figure is" in out
    assert "reference points and offsets" in out and "4x8" in out and "compare" in err


def test_json(original, tmp_path, capsys):
    assert run("fuse", original, "-o", tmp_path / "fused.onnx", "--attention", "gather", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and report["metadata"]["attention"] == "gather" and len(report["regions"]) == 1


def test_nothing_to_fuse(tmp_path, capsys):
    original = attention.export(tmp_path / "original.onnx", wrong="grid")
    assert run("fuse", original, "-o", tmp_path / "fused.onnx", "--json") == 1
    out, err = capsys.readouterr()
    assert "nothing was written" in json.loads(out)["error"]
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "fused.onnx").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["missing.onnx", "-o", "a.onnx"], "does not exist"),
        (["{original}", "-o", "a.plan"], "must end in .onnx"),
        (["{original}", "-o", "nowhere/a.onnx"], "does not exist. Make it first"),
        (["{original}", "-o", "a.onnx", "--attention", "ops"], "Did you mean 'op'?"),
        (["{original}", "-o", "a.onnx", "--inputs", "{original}"], "is no .npz file"),
    ],
)
def test_wrong_use(original, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert run("fuse", *(text.format(original=original) for text in arguments)) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_inputs(original, tmp_path):
    np.savez(tmp_path / "inputs.npz", **{name: value.numpy() for name, value in attention.inputs(2).items()})
    assert run("fuse", original, "-o", tmp_path / "fused.onnx", "--inputs", tmp_path / "inputs.npz") == 0
