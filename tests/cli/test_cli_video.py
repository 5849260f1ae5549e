"""litedetr predict on videos and streams: what it prints, writes, and leaves when it is interrupted."""

import json
import os
import signal
import subprocess
import sys

import pytest

from litedetr_deploy.runtime.sources import find_sources

from ..runtime.clips import grey, save_clip, save_gif
from ..runtime.tiny_artifact import save_detector
from .interruption import interrupt

av = pytest.importorskip("av")


@pytest.fixture
def model(tmp_path):
    return save_detector(tmp_path / "model.onnx", size=(48, 64))


@pytest.fixture
def clip(tmp_path):
    return save_clip(tmp_path / "clip.mp4")


def frames(path):
    [source] = find_sources(path)
    return list(source.read())


def test_a_video_to_a_video(litedetr, model, clip, tmp_path):
    done = litedetr("predict", model, clip, "-o", tmp_path / "found.mp4")
    assert done.exit_code == 0, done.stderr
    line, summary = done.stdout.splitlines()
    assert line.startswith(f"{clip}: 10 frames, 16 objects: dog 10, person 6 (") and line.endswith(" frames/s)")
    assert summary.startswith("10 frames, median ") and summary.endswith(f" frames/s, all in {tmp_path / 'found.mp4'}")
    assert len(frames(tmp_path / "found.mp4")) == 10


def test_a_folder_with_everything(litedetr, model, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    save_clip(tmp_path / "in" / "a.mkv", 3)
    save_gif(tmp_path / "in" / "deep" / "b.gif")
    grey(1).save(tmp_path / "in" / "c.jpg")
    done = litedetr("predict", model, tmp_path / "in", "--recursive", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert [(os.path.basename(one["path"]), one.get("frame")) for one in report["images"]] == [
        ("a.mkv", 0), ("a.mkv", 1), ("a.mkv", 2), ("c.jpg", None), ("b.gif", 0), ("b.gif", 1), ("b.gif", 2),
    ]  # fmt: skip
    assert sorted(os.listdir(tmp_path / "out")) == ["a.mp4", "b.gif", "c.jpg"]


def test_lines_on_standard_output(litedetr, model, clip):
    done = litedetr("predict", model, clip, "--format", "jsonl", "--classes", "person,5", "--max-detections", "1")
    assert done.exit_code == 0
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["frame"] for line in lines] == list(range(10))
    assert {one["name"] for line in lines for one in line["detections"]} == {"person"}
    assert json.loads(litedetr("predict", model, clip, "--format", "coco").stdout)[0]["image_id"] == f"{clip}#0"
    assert litedetr("predict", model, clip, "--format", "csv").stdout.startswith("path,frame,time,label,name,score,x1")


def test_batches_on_the_cpu(litedetr, model, clip):
    def found(*options):
        return litedetr("predict", model, clip, *options).stdout.splitlines()[0].partition(" (")[0]

    assert found("--batch-size", "4", "--device", "cpu") == found()


def test_standard_input(model, clip):
    code = "from litedetr_deploy.cli import main; main()"
    command = [sys.executable, "-c", code, "predict", model, "-", "--format", "jsonl"]
    save_clip(clip.with_suffix(".mkv"))
    done = subprocess.run(command, input=clip.with_suffix(".mkv").read_bytes(), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == ["standard input"] * 10


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gone.mp4"], "There is no image or video gone.mp4: the path does not exist. Check it."),
        (["rtsp://user:secret@127.0.0.1:9/live"], "rtsp://127.0.0.1:9/live cannot be opened: Connection refused."),
        (["http://127.0.0.1:9/a.mp4"], "http://127.0.0.1:9/a.mp4 cannot be opened: Connection refused."),
        (["text.mp4"], "text.mp4 cannot be read as a video: Invalid data"),
        (["99"], "The camera 99 does not exist: /dev/video99 is missing"),
        (["clip.mp4", "--classes", "dgo"], "The model has no class 'dgo'; it has 19, 'N/A', 'person', 'thing 2' and"),
        (["clip.mp4", "--classes", "dgo"], "Did you mean 'dog'?"),
        (["clip.mp4", "--classes", "95"], "The model has no class '95'"),
        (["clip.mp4", "--device", "gpu"], "device is 'gpu'; it must be 'cpu', 'cuda'"),
        (["clip.mp4", "--device", "cuda", "--runtime", "openvino"], "OpenVINO runs on the CPU here"),
        (["clip.mp4", "--format", "jsonl", "--json"], "both go to standard output"),
        (["clip.mp4", "-o", "clip.mp4"], "is one of the images itself"),
    ],
)
def test_bad_input_is_one_paragraph(litedetr, model, clip, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("no video")
    before = sorted(tmp_path.rglob("*"))
    done = litedetr("predict", model, *arguments, *([] if "-o" in arguments or "--json" in arguments else ["-o", "o/"]))
    assert done.exit_code == 2 and message in done.stderr and "secret" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] and "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_gpu_that_is_not_there(litedetr, model, clip):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    done = litedetr("predict", model, clip, "--device", "cuda:1")
    assert done.exit_code == 2 and "device is 'cuda:1', and the ONNX Runtime here has no CUDA" in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_finishes_the_video(model, tmp_path, sent):
    clip = save_clip(tmp_path / "clip.mp4", 12)
    # Every frame takes a moment, and from the fourth on for ever.
    code = (
        "import time, litedetr_deploy.runtime.session as session; from litedetr_deploy.cli import main; "
        "run, count = session.OnnxSession.run, []; "
        "wait = lambda: (print('waiting', flush=True), [time.sleep(0.1) for _ in range(600)]); "
        "slow = lambda self, feed: (count.append(1), len(count) > 3 and wait(), run(self, feed))[2]; "
        "session.OnnxSession.run = slow; main()"
    )
    errors = interrupt(code, ["predict", model, clip, "-o", tmp_path / "found.mp4"], sent, timeout=60)
    assert errors.endswith("interrupted; 3 frames were written\n")
    assert len(frames(tmp_path / "found.mp4")) == 3
    assert sorted(os.listdir(tmp_path)) == ["clip.mp4", "found.mp4", "model.onnx"]
