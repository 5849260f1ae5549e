"""The Ray Serve example as a user runs it: the program, HTTP, and its page in a browser."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import litedetr_deploy as ld
from litedetr_deploy.assets import shapes
from litedetr_deploy.runtime.draw import class_colour

from ..runtime.tiny_artifact import save_detector
from .conftest import EXAMPLES

pytest.importorskip("ray")
SIZE = (256, 256)
PROGRAM = [sys.executable, str(EXAMPLES / "ray_serve.py")]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "shapes.onnx"
    ld.export_onnx(ld.load_model("lite-dino-shapes"), path, image_size=SIZE, verify=False)
    return path


@pytest.fixture(scope="module")
def address(detector):
    port = free_port()
    command = [*PROGRAM, str(detector), "--port", str(port), "--batch-size", "4", "--wait", "0.2"]
    # Its proxy has 5 s to import what it needs, which a busy machine takes longer for.
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as program:
        lines = []
        for line in program.stdout:
            lines.append(line)
            if line.startswith("Drop an image on"):
                break
        else:
            pytest.fail(f"the program ended: {lines}")
        yield f"http://127.0.0.1:{port}"
        program.send_signal(signal.SIGINT)
        program.stdout.read()
        program.wait()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    shapes.scene(4, 7, SIZE)[0].save(path)
    return path


def post(address, contents):
    try:
        with urllib.request.urlopen(f"{address}/detect", contents) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_bad_input(tmp_path):
    model = save_detector(tmp_path / "model.onnx")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, nowhere = taken.getsockname()[1], f"127.0.0.1:{free_port()}"
        for arguments, address, message in (
            ([model, "--port", port], "local", f"The port {port} of 127.0.0.1 cannot be used: Address already in use."),
            (["gone.onnx", "--port", free_port()], "local", "gone.onnx does not exist"),
            ([model, "--port", free_port()], nowhere, f"There is no Ray cluster at {nowhere}"),
        ):
            environment = os.environ | {"RAY_ADDRESS": address}
            done = subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, env=environment)
            [line] = done.stderr.splitlines()
            assert done.returncode == 2 and done.stdout == ""
            assert line.startswith("error: ") and message in line


@pytest.mark.slow
def test_requests_and_page(address, detector, scene, tmp_path):
    """What comes back is what the detector finds, for requests that share a batch too; the page draws it."""
    plain = ld.Detector(detector)
    images = [shapes.scene(index, 7, SIZE)[0] for index in range(8)]
    bodies = []
    for image in images:
        image.save(body := io.BytesIO(), "PNG")
        bodies.append(body.getvalue())
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda body: post(address, body), bodies))
    for image, (status, answer) in zip(images, answers):
        [found] = plain.predict(image, threshold=0.3)
        assert status == 200 and (answer["width"], answer["height"]) == SIZE
        assert [one["name"] for one in answer["detections"]] == found.names and len(found)
        np.testing.assert_allclose([one["box"] for one in answer["detections"]], found.boxes, atol=0.01)

    together = [answer["batch"] for _, answer in answers]
    assert max(together) > 1 and max(together) <= 4, together
    print(f"\n8 requests at once ran in batches of {together}")

    status, answer = post(address, b"no image")
    assert status == 400 and "is not an image that can be read" in answer["error"]

    pytest.importorskip("PyQt6.QtWebEngineWidgets", reason="the page's test needs a browser: PyQt6-WebEngine")
    state = browse(address, scene, tmp_path / "page.png")
    [found] = plain.predict(scene, threshold=0.3)
    assert state["said"].startswith(f"{len(found)} object") and not state["error"]
    shown = Image.open(io.BytesIO(base64.b64decode(state["shown"].partition(",")[2]))).convert("RGB")
    scale = shown.width // SIZE[1]
    assert shown.size == (SIZE[1] * scale, SIZE[0] * scale)
    pixels = np.asarray(shown).astype(int)
    for label, box in zip(found.labels, found.boxes):  # the middles of the box's left and lower edges have its colour
        left, top, right, bottom = np.clip(np.rint(box * scale), 2, shown.width - 3).astype(int)
        for x, y in ((left, (top + bottom) // 2), ((left + right) // 2, bottom)):
            around = pixels[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3)
            assert np.abs(around - class_colour(int(label))).max(1).min() < 40, (label, box)

    state = browse(address, Path(__file__), tmp_path / "error.png")
    assert state["error"] and "is not an image that can be read" in state["said"] and not state["shown"]


def browse(address, file, screenshot):
    browser = [sys.executable, str(Path(__file__).with_name("browser.py"))]
    done = subprocess.run([*browser, address, str(file), str(screenshot)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(screenshot).size == (800, 900)
    return json.loads(done.stdout)
