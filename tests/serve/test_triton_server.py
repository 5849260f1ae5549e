"""NVIDIA's server on a repository of the Python back end: its answers are the detector's."""

import io
import shutil
import socket
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import litedetr_deploy as ld
from litedetr_deploy.assets import shapes
from litedetr_deploy.runtime.images import load_image, prepare
from litedetr_deploy.serve.triton import write_repository

from ..runtime.tiny_artifact import save_detector
from .client import Client, largest_difference
from .server import free_ports, installed, serving, start

pytest.importorskip("tritonclient", reason="tritonclient is not installed")
from tritonclient.utils import InferenceServerException  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installed(), reason="nvidia-pytriton is not installed"),
    pytest.mark.xdist_group("triton"),
]

SIZE = (256, 256)
# Of scores, and of boxes in the extent of all: what float32 loses in a batch of another size.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "shapes.onnx"
    assert ld.export_onnx(ld.load_model("lite-dino-shapes"), path, image_size=SIZE).passed
    return path


@pytest.fixture(scope="module")
def files():
    """JPEG files of several sizes."""
    found = []
    for index, size in enumerate([SIZE, (200, 320), (480, 360), SIZE, SIZE, (256, 300)]):
        file = io.BytesIO()
        shapes.scene(index, 3, size)[0].save(file, "JPEG", quality=95)
        found.append(file.getvalue())
    return found


@pytest.fixture(scope="module")
def wanted(model, files):
    return list(ld.Detector(model).stream(files, clip=False))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    write_repository(model, folder / "repository", instances=2, max_batch_size=4)
    # A second model, of dynamic size and of standard ops, which answers with the mean of its input.
    other = save_detector(folder / "dynamic.onnx", size=None)
    write_repository(other, folder / "dynamic")
    for one in ("dynamic", "dynamic_preprocess", "dynamic_jpeg"):
        shutil.move(folder / "dynamic" / one, folder / "repository")
    with serving(folder / "repository", folder) as started:
        yield started


@pytest.fixture(params=["http", "grpc"])
def client(request, server):
    with Client(server, request.param) as one:
        yield one


def jpeg(*files):
    return {"image": np.array([[file] for file in files], object)}


def test_one_file(client, files, wanted):
    answer = client.detect("shapes_jpeg", jpeg(files[1]))
    assert answer["labels"].shape == (1, 300) and answer["boxes"].shape == (1, 300, 4)
    assert largest_difference(answer, wanted[1]) < TOLERANCE
    assert wanted[1].scores[0] > 0.3  # something was found
    assert largest_difference(answer, wanted[0]) > 1e-2  # the comparison can tell


def test_tensors_in_a_batch(client, files, wanted):
    prepared = [prepare(load_image(file), "stretch", SIZE) for file in files[:3]]
    feed = {
        "images": np.stack([one.pixels for one in prepared]),
        "orig_target_sizes": np.array([one.original_size for one in prepared], np.int64),
    }
    answer = client.detect("shapes", feed)
    assert max(largest_difference(answer, wanted[i], i) for i in range(3)) < TOLERANCE


def test_files_in_a_batch(client, files, wanted):
    answer = client.detect("shapes_jpeg", jpeg(*files[2:6]))
    assert max(largest_difference(answer, wanted[2 + i], i) for i in range(4)) < TOLERANCE


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_in_parallel(server, files, wanted, protocol):
    def ask(number):
        with Client(server, protocol) as one:
            answer = one.detect("shapes_jpeg", jpeg(files[number % 6]))
        return largest_difference(answer, wanted[number % 6])

    with ThreadPoolExecutor(6) as pool:
        assert max(pool.map(ask, range(18))) < TOLERANCE


def test_a_file_that_is_no_image_fails_alone(server, files, wanted):
    def ask(file):
        with Client(server, "http") as one:
            try:
                return one.detect("shapes_jpeg", jpeg(file))
            except InferenceServerException as error:
                return str(error)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, [files[0], b"nothing", files[1], files[2][:1000], files[3]]))
    assert "a file of 7 bytes is not an image that can be read. Give a JPEG" in answers[1]
    assert "a file of 1000 bytes cannot be read" in answers[3]
    for i in (0, 2, 4):
        index = {0: 0, 2: 1, 4: 3}[i]
        assert largest_difference(answers[i], wanted[index]) < TOLERANCE


def test_dynamic_sizes(client, files, server):
    answer = client.detect("dynamic_jpeg", jpeg(files[1]))
    [found] = ld.Detector(server.log.parent / "dynamic.onnx").stream([files[1]], clip=False)
    assert largest_difference(answer, found) < TOLERANCE
    with pytest.raises(InferenceServerException, match="Send each in a request of its own"):
        client.detect("dynamic_jpeg", jpeg(files[1], files[2]))


def test_a_shape_that_does_not_fit_is_refused(client):
    feed = {"images": np.zeros((1, 3, 64, 64), np.float32), "orig_target_sizes": np.zeros((1, 2), np.int64)}
    with pytest.raises(InferenceServerException, match=r"Expected \[-1,3,256,256\]"):
        client.detect("shapes", feed)
    with pytest.raises(InferenceServerException, match="batch-size must be <= 4"):
        client.detect("shapes_jpeg", jpeg(*[b""] * 5))


def test_what_the_server_says_of_the_models(server):
    with Client(server, "grpc") as one:
        for model in ("shapes", "shapes_preprocess", "shapes_jpeg"):
            assert one.raw.is_model_ready(model)
        config = one.raw.get_model_config("shapes").config
    assert (config.backend, config.max_batch_size, config.instance_group[0].count) == ("python", 4, 2)
    assert config.HasField("dynamic_batching") and config.model_warmup[0].batch_size == 1
    assert "not proven" not in server.log.read_text()


def log_of_failure(server) -> str:
    """Return the log of a server that ends by itself with status 1."""
    try:
        assert server.process.wait(120) == 1
    finally:
        server.process.kill()
    return server.log.read_text()


def test_a_port_in_use(tmp_path):
    write_repository(save_detector(tmp_path / "model.onnx"), tmp_path / "repository")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        taken = one.getsockname()[1]
        log = log_of_failure(start(tmp_path / "repository", tmp_path, ports=free_ports() | {"http": taken}))
    assert f"Socket '127.0.0.1:{taken}' already in use" in log


def test_an_unverified_model_is_said_in_the_log(tmp_path):
    model = save_detector(tmp_path / "model.onnx", verification={"verdict": "failed"})
    write_repository(model, tmp_path / "repository", allow_unverified=True)
    with serving(tmp_path / "repository", tmp_path) as server:
        assert "failed its verification: its results are not proven" in server.log.read_text()


def test_numpy_2_is_refused(tmp_path):
    if np.lib.NumpyVersion(np.__version__) < "2.0.0":
        pytest.skip("NumPy 1 is installed")
    write_repository(save_detector(tmp_path / "model.onnx"), tmp_path / "repository")
    log = log_of_failure(start(tmp_path / "repository", tmp_path, python_path=sysconfig.get_path("purelib")))
    assert f"NumPy {np.__version__} is installed; Triton's Python back end takes NumPy 1.26" in log


def test_a_new_version_takes_over(tmp_path):
    for folder in ("repository", "new"):
        write_repository(save_detector(tmp_path / "model.onnx"), tmp_path / folder)
    feed = {"images": np.full((1, 3, 64, 96), 0.5, np.float32), "orig_target_sizes": np.array([[96, 64]], np.int64)}
    poll = "--model-control-mode=poll", "--repository-poll-secs=1"
    with serving(tmp_path / "repository", tmp_path, *poll) as server, Client(server, "http") as one:
        before = one.detect("model", feed)
        (tmp_path / "new" / "model" / "1").rename(tmp_path / "repository" / "model" / "2")
        until = time.monotonic() + 120
        while not one.raw.is_model_ready("model", "2") or one.raw.is_model_ready("model", "1"):
            assert time.monotonic() < until, server.log.read_text()[-4000:]
            time.sleep(0.2)
        assert np.array_equal(one.detect("model", feed)["scores"], before["scores"])
