import json
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from litedetr_deploy import cli
from litedetr_deploy.engine import api
from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.ops import native
from litedetr_deploy.runtime import environment


def find(findings, topic, name):
    [finding] = [finding for finding in findings if (finding["topic"], finding["name"]) == (topic, name)]
    return finding


def test_json_agrees_with_the_exit_status():
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == (0 if report["healthy"] else 1)
    assert find(report["findings"], "packages", "numpy")["state"] == "ok"
    assert "CPUExecutionProvider" in find(report["findings"], "ONNX Runtime", "providers")["value"]
    assert int(find(report["findings"], "CPU", "cores for this process")["value"]) >= 1


def test_missing_library_is_broken_and_has_a_remedy(monkeypatch):
    def missing(name):
        raise FileNotFoundError(f"{name} was not built: run pip install .")

    monkeypatch.setattr(native, "library", missing)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "core was not built: run pip install ." in result.stdout and "✗ broken: core, onnxruntime" in result.stdout


def test_the_op_runs_and_is_right():
    try:
        native.library("onnxruntime")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert find(json.loads(result.stdout)["findings"], "ONNX Runtime", "op") == {
        "topic": "ONNX Runtime",
        "name": "op",
        "state": "ok",
        "value": "KeyAwareDeformAttn runs and is right",
        "remedy": "",
    }


def test_an_op_that_computes_something_else_is_broken(monkeypatch):
    class Wrong:
        def run(self, feed):
            return {"output": feed["value"] + 1}

    monkeypatch.setattr(native, "library", lambda name: Path("/lib/library.so"))
    monkeypatch.setattr(native, "load_core", lambda: types.SimpleNamespace(kda_cpu_isa=lambda: b"avx2"))
    monkeypatch.setattr(environment, "register_ops", lambda options: None)
    monkeypatch.setattr(environment, "open_session", lambda model, runtime: Wrong())
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    op = find(json.loads(result.stdout)["findings"], "ONNX Runtime", "op")
    assert result.exit_code == 1 and op["state"] == "broken" and "[[[1.0, 2.0, 3.0, 4.0]]] where" in op["remedy"]


def test_doctor_and_build_agree_that_a_folder_is_not_tensorrt(monkeypatch, tmp_path):
    (tmp_path / "tensorrt").mkdir()  # as a package of type stubs leaves it
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        sys, "path", [str(tmp_path), *(path for path in sys.path if not Path(path, "tensorrt").is_dir())]
    )
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    found = find(json.loads(result.stdout)["findings"], "packages", "tensorrt")
    assert found["state"] == "absent" and "is a folder of that name, and no package" in found["remedy"]
    with pytest.raises(LiteDetrError) as refused:
        api.Builder("tensorrt")
    assert str(refused.value) in found["remedy"]
