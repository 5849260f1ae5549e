"""Bad input and narrow terminals: what every command says, and never 'likely a bug'."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from litedetr_deploy import cli
from litedetr_deploy.cli._console import print_verdict
from litedetr_deploy.verify.verdict import Verdict

from ..runtime.tiny_artifact import NAMES, save_detector, save_raw_detector


@pytest.fixture
def main(capsys, monkeypatch):
    """Run the program itself in this process; returns its exit status, stdout and stderr."""
    monkeypatch.delenv("LITEDETR_DEBUG", raising=False)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        return (end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def image(tmp_path):
    Image.fromarray(np.full((100, 200, 3), 102, np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["exprot"], "No such command 'exprot'. Did you mean 'export'?"),
        (["predict", "m.onnx", "a.png", "--treshold", "0.5"], "No such option: --treshold"),
        (["predict", "m.onnx"], "Missing argument"),
        (["predict", "m.onnx", "a.png", "--threshold", "high"], "--threshold"),
        (["evaluate", "m.onnx", "--data", "gone"], "does not exist"),
    ],
)
def test_wrong_use_is_one_line_and_json_on_demand(main, arguments, message):
    status, out, err = main(*arguments)
    assert status == 2 and out == ""
    assert err.splitlines()[-1].startswith("error: ") and message in err, err
    status, out, err = main(*arguments, "--json")
    report = json.loads(out)
    assert status == report["exit_status"] == 2 and message in report["error"]


def test_the_nearest_option_is_named(main):
    _, _, err = main("predict", "m.onnx", "a.png", "--treshold", "0.5")
    assert "--threshold" in err.partition("--treshold")[2] and "litedetr predict --help" in err


def test_help_and_no_arguments(main):
    for arguments, status in ((["--help"], 0), (["predict", "--help"], 0), ([], 2)):
        assert main(*arguments)[0] == status


def test_json_of_an_error_within_a_command(main, image, tmp_path):
    status, out, err = main("predict", tmp_path / "gone.onnx", image, "--json")
    assert json.loads(out) == {"error": err.removeprefix("error: ").strip(), "exit_status": 2} and status == 2


def test_what_is_not_verified_gets_one_warning_line(main, image, tmp_path):
    bad = save_detector(tmp_path / "bad.onnx", verification={"verdict": "failed", "why": "boxes differ"})
    status, out, err = main("predict", bad, image)
    assert status == 0 and "2 objects" in out
    assert err == f"warning: {bad} failed its verification (boxes differ): its results are not proven.\n"
    good = save_detector(tmp_path / "good.onnx")
    assert main("predict", good, image)[2] == ""
    good.write_bytes(good.read_bytes().replace(b"tiny", b"TINY"))
    status, out, err = main("predict", good, image, "--json")
    assert status == 0 and json.loads(out)["images"]
    assert err == f"warning: {good} was rewritten after it was verified: its results are not proven.\n"


def test_many_threads(main, image, tmp_path):
    status, _, err = main("predict", save_detector(tmp_path / "m.onnx"), image, "--threads", 100_000)
    assert status == 0 and err.startswith("warning: 100000 threads are asked for")


@pytest.mark.parametrize("name", ["out.foo", "out.onnx", "v1.2"])
def test_an_output_of_an_unknown_suffix_is_refused(main, image, tmp_path, name):
    model = save_detector(tmp_path / "m.onnx")
    status, _, err = main("predict", model, image, "-o", tmp_path / name)
    assert status == 2 and "which is no image format" in err and not (tmp_path / name).exists()
    (tmp_path / name).mkdir()  # a folder that is there may have any name
    assert main("predict", model, image, "-o", tmp_path / name)[0] == 0
    assert os.listdir(tmp_path / name) == ["a.png"]


def test_names_with_control_characters_are_escaped(main, tmp_path):
    image = tmp_path / "a\n\x1b[31mred.png"
    Image.new("RGB", (20, 10)).save(image)
    names = [*NAMES[:18], "a\ndog\x07"]
    status, out, err = main(
        "predict", save_detector(tmp_path / "m.onnx", class_names=names), image, "-o", tmp_path / "o"
    )
    assert status == 0 and err == ""
    first, _ = out.splitlines()
    assert r"a\n\x1b[31mred.png: " in first and r"a\ndog\x07 0.90" in first
    status, out, err = main("predict", tmp_path / "b\n.onnx", image)
    assert status == 2 and len(err.splitlines()) == 1 and r"b\n.onnx does not exist" in err


@pytest.mark.parametrize("command", ["predict", "doctor", "evaluate"])
def test_a_terminal_of_ascii(tmp_path, command):
    names = [*NAMES[:18], "犬"]
    image = tmp_path / "é.png"
    Image.new("RGB", (20, 10)).save(image)
    arguments = {
        "predict": ["predict", save_detector(tmp_path / "m.onnx", class_names=names), image],
        "doctor": ["doctor"],
        "evaluate": ["evaluate", tmp_path / "é.onnx", "--shapes"],
    }[command]
    code = "import sys; from litedetr_deploy.cli import main; main(sys.argv[1:])"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True)
    text = done.stdout.decode("ascii") + done.stderr.decode("ascii")
    assert "unexpected" not in text
    if command == "predict":
        assert done.returncode == 0 and r"\u72ac 0.90" in text
    elif command == "doctor":
        assert done.returncode == 0 and "+ numpy" in text
    else:
        assert done.returncode == 2 and r"\xe9.onnx does not exist" in text


@pytest.mark.parametrize(
    "arguments, module, extra",
    [
        (["export", "lite-dino-shapes", "-o", "{}/m.onnx"], "torch", "export"),
        (["export", "lite-dino-shapes", "-o", "{}/m.onnx"], "onnx", "export"),
        (["evaluate", "lite-dino-shapes", "--shapes", "--count", "1"], "torch", "export"),
        (["evaluate", "{}/m.onnx", "--shapes", "--count", "1"], "pycocotools", "evaluate"),
        (["evaluate", "{}/m.onnx", "--shapes", "--count", "1"], "onnxruntime", "onnxruntime"),
        (["predict", "{}/m.onnx", "{}/a.png"], "onnxruntime", "onnxruntime"),
        (["predict", "{}/m.onnx", "{}/a.mp4", "-o", "{}/b.mp4"], "av", "video"),
        (["predict", "{}/m.onnx", "rtsp://127.0.0.1:9/a"], "av", "video"),
        (["build", "{}/m.onnx", "-o", "{}/m.plan"], "onnx", "export"),
        (["build", "lite-dino-shapes", "-o", "{}/m.plan", "--backend", "tensorrt-rtx"], "torch", "export"),
        (["benchmark", "gflops"], "torch", "export"),
    ],
)
def test_a_slim_installation_names_the_extra(image, tmp_path, arguments, module, extra):
    save_detector(tmp_path / "m.onnx")
    (tmp_path / "a.mp4").write_bytes(b"")
    if "build" in arguments and module == "torch":
        pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")
    code = f"import sys; sys.modules[{module!r}] = None; from litedetr_deploy.cli import main; main(sys.argv[1:])"
    arguments = [argument.format(tmp_path) for argument in arguments]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and f"`pip install litedetr-deploy[{extra}]`" in line and module in line


def test_no_memory_is_no_bug(main, image, tmp_path, monkeypatch):
    from litedetr_deploy.runtime import sources

    def load_image(path):
        raise MemoryError("240 GB")

    monkeypatch.setattr(sources, "load_image", load_image)
    status, _, err = main("predict", save_detector(tmp_path / "m.onnx"), image)
    assert status == 2 and "the memory is not enough (240 GB)" in err


def test_a_verdict_is_one_line_or_a_table(capsys):
    verdict = Verdict()
    verdict.add("image 1", "boxes", 1e-5, 1e-3)
    print_verdict(verdict.to_dict())
    assert capsys.readouterr().out.startswith("verified against PyTorch; the worst figure is 1% of its tolerance")
    print_verdict(verdict.to_dict(), verbose=True)
    assert "1.0e-05" in capsys.readouterr().out
    verdict.add("image\n2", "[bold]boxes", 1e-5, 1e-3, "holds NaN in PyTorch as well")
    print_verdict(verdict.to_dict())
    out = capsys.readouterr().out
    assert "holds NaN in PyTorch as well" in out and r"image\n2" in out and "[bold]boxes" in out
    assert out.splitlines()[-1].startswith("VERIFICATION FAILED")


def test_raw_boxes_are_clipped(main, image, tmp_path):
    logits, boxes = np.full((1, len(NAMES)), 2, np.float32), np.array([[0, 0.5, 1, 2]], np.float32)
    model = save_raw_detector(tmp_path / "m.onnx", logits, boxes)
    _, out, _ = main("predict", model, image, "--json")
    assert json.loads(out)["images"][0]["detections"][0]["box"] == [0, 0, 100, 100]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["export", "lite-dino-shapes", "-o", "m.onnx", "--attention", "opp"], "Did you mean 'op'?"),
        (["export", "lite-dino-shapes", "-o", "m.onnx", "--variant", "lite-dino-r5O"], "Did you mean 'lite-dino-r50'?"),
        (
            ["export", "lite-dino-shapes", "-o", "m.onnx", "--variant", "dino-r5O-h3l1-2+1x3"],
            "Did you mean 'dino-r50'?",
        ),
        (["evaluate", "m.onnx", "--shapes", "--image-size", "100000"], "10,000,000,000 pixels"),
        (["evaluate", "m.onnx", "--shapes", "--image-sizes", "0"], "at least 64 pixels"),
        (["benchmark", "gflops", "--image-size", "1x1"], "at least 64 pixels"),
    ],
)
def test_mistyped_values(main, arguments, message):
    status, _, err = main(*arguments)
    assert status == 2 and message in err.splitlines()[-1]
