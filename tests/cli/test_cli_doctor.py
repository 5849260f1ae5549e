import json

from typer.testing import CliRunner

from litedetr_deploy import cli
from litedetr_deploy.ops import native


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


def test_the_op_runs_where_its_library_is_built():
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    findings = json.loads(result.stdout)["findings"]
    if find(findings, "native libraries", "onnxruntime")["state"] == "ok":
        assert find(findings, "ONNX Runtime", "op") == {
            "topic": "ONNX Runtime",
            "name": "op",
            "state": "ok",
            "value": "KeyAwareDeformAttn runs and is right",
            "remedy": "",
        }
