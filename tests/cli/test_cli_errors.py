"""Exit statuses and messages: every way a command can end."""

import os
import signal
import sys

import pytest
import typer
from typer.testing import CliRunner

from litedetr_deploy import cli
from litedetr_deploy.cli._checks import image_size
from litedetr_deploy.cli._console import guarded
from litedetr_deploy.errors import CheckFailed, LiteDetrError

from .interruption import interrupt


def raising(error):
    app = typer.Typer()

    @app.command()
    @guarded
    def command():
        raise error

    return CliRunner().invoke(app)


@pytest.mark.parametrize(
    "error, status, text",
    [
        (LiteDetrError("The value is 3; it must be 4."), 2, "error: The value is 3; it must be 4.\n"),
        (CheckFailed("They differ."), 1, "error: They differ.\n"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written\n"),
        (KeyboardInterrupt("2 of 3 images were written"), 130, "interrupted; 2 of 3 images were written\n"),
        (ZeroDivisionError("division by zero"), 3, "unexpected ZeroDivisionError: division by zero"),
        (OSError(28, "No space left on device", "/x"), 2, "No space left on device"),
    ],
)
def test_each_error_has_its_status_and_one_paragraph(error, status, text, monkeypatch):
    monkeypatch.delenv("LITEDETR_DEBUG", raising=False)
    result = raising(error)
    assert result.exit_code == status
    assert text in result.stderr and "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("LITEDETR_DEBUG", "1")
    assert "Traceback" in raising(ZeroDivisionError()).stderr


def test_help_and_version():
    for command in ([], ["export"], ["verify"], ["predict"], ["doctor"]):
        assert CliRunner().invoke(cli.app, [*command, "--help"]).exit_code == 0
    assert "litedetr-deploy" in CliRunner().invoke(cli.app, ["--version"]).stdout
    assert CliRunner().invoke(cli.app, ["fly"]).exit_code == 2


def test_image_size():
    assert image_size("800x1333") == (800, 1333)
    assert image_size("dynamic") is None
    assert image_size("640") == (640, 640)
    for text in ("abc", "-5x640", "640x", "640x640x3", "1e3x640", ""):
        with pytest.raises(LiteDetrError, match="image size is"):
            image_size(text)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"no weights")
    return path


@pytest.mark.parametrize(
    "options, message",
    [
        (["--image-size", "0x0"], "at least 64 pixels"),
        (["--image-size", "abc"], "HEIGHTxWIDTH"),
        (["--image-size", "63x640"], "at least 64 pixels"),
        (["--attention", "magic"], "'gridsample'"),
        (["--outputs", "magic"], "'raw'"),
        (["--opset", "16"], "17 to 21"),
        (["--opset", "20", "--attention", "gridsample"], "17 to 19"),
        (["--images", "gone.jpg"], "gone.jpg does not exist"),
        (["-o", "gone/model.onnx"], "output directory gone does not exist"),
        (["-o", "model.txt"], "must end in .onnx"),
    ],
)
def test_export_checks_its_arguments_before_it_imports_torch(
    litedetr, checkpoint, tmp_path, monkeypatch, options, message
):
    monkeypatch.setitem(sys.modules, "torch", None)
    done = litedetr("export", checkpoint, *([] if "-o" in options else ["-o", tmp_path / "model.onnx"]), *options)
    assert done.exit_code == 2
    assert message in done.stderr and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ["weights.pth"]


def test_export_names_a_missing_checkpoint(litedetr, tmp_path):
    done = litedetr("export", tmp_path / "gone.pth", "-o", tmp_path / "model.onnx")
    assert done.exit_code == 2 and "gone.pth does not exist. Give the path of the checkpoint." in done.stderr


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_export_to_an_unwritable_directory(litedetr, checkpoint, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    done = litedetr("export", checkpoint, "-o", locked / "model.onnx")
    assert done.exit_code == 2 and "not writable" in done.stderr


def test_verify_reports_a_damaged_model_before_it_imports_torch(litedetr, checkpoint, tmp_path):
    (tmp_path / "model.onnx").write_text("text")
    done = litedetr("verify", tmp_path / "model.onnx", checkpoint)
    assert done.exit_code == 2 and "is not an ONNX model" in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path, sent):
    from ..runtime.tiny_artifact import save_detector

    model = save_detector(tmp_path / "model.onnx")
    (tmp_path / "a.jpg").touch()
    # Reading the image takes for ever.
    code = (
        "import litedetr_deploy.runtime.images as images, time; from litedetr_deploy.cli import main; "
        "images.load_image = lambda path: (print('waiting', flush=True), [time.sleep(0.1) for _ in range(600)]); main()"
    )
    errors = interrupt(code, ["predict", model, tmp_path / "a.jpg"], sent, timeout=20)
    assert errors.endswith("interrupted; 0 of 1 images were written\n")
