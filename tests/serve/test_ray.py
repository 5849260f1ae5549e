"""Jobs on Ray.  Those that need a cluster run one of two CPUs, which a test connects to by its address."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import litedetr_deploy as ld
from litedetr_deploy.assets import shapes
from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.evaluate.evaluate import Options
from litedetr_deploy.runtime.images import load_image

from ..runtime.tiny_artifact import save_detector

pytest.importorskip("ray")
parquet = pytest.importorskip("pyarrow.parquet")
from litedetr_deploy.serve import ray as jobs  # noqa: E402
from litedetr_deploy.serve import storage  # noqa: E402

SCENES, SHARD, SIZE = 500, 25, (128, 128)
COMMAND = [sys.executable, "-c", "from litedetr_deploy.cli import main; main()", "predict"]
WORKER = b"ray::MapWorker(MapBatches(_Actor))"


@pytest.fixture
def model(tmp_path):
    return save_detector(tmp_path / "model.onnx")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more" / "deep").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.jpg", "more/c.png", "more/deep/d.PNG")):
        Image.fromarray(np.full((100, 200, 3), 40 * number, np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def address():
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for index in range(SCENES):
        shapes.scene(index, 7, SIZE)[0].save(folder / f"{index:03}.png", compress_level=1)
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "shapes.onnx"
    ld.export_onnx(ld.load_model("lite-dino-shapes"), path, image_size=SIZE, verify=False)
    return path


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("", "a.jpg b.png"),
        ("b.png", "b.png"),
        ("*", "a.jpg b.png"),
        ("[!b].jpg", "a.jpg"),
        ("*/*", "more/c.png"),
        ("**/*.[pP]*", "b.png more/c.png more/deep/d.PNG"),
    ],
)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_sources(pictures, source, names, scheme):
    found = storage.find_images([f"{scheme}{pictures}/{source}", f"{pictures}/b.png"])
    assert sorted(image.name for image in found) == [str(pictures / name) for name in sorted({*names.split(), "b.png"})]


def test_a_name_that_looks_like_a_pattern(pictures):
    Image.new("RGB", (9, 9)).save(pictures / "a[b].png")
    assert [image.name for image in storage.find_images([pictures / "a[b].png"])] == [str(pictures / "a[b].png")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ["/gone/a.png"]}, "/gone/a.png does not exist"),
        ({"sources": ["/gone/*.png"]}, "pattern /gone/.* holds no image"),
        ({"sources": ["nowhere://bucket/a"]}, "nowhere://bucket/a is no place that can be read"),
        ({"format": "parket"}, "Did you mean 'parquet'"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"cluster": jobs.Cluster(workers=0)}, "workers is 0"),
        ({"model": "gone.onnx"}, "gone.onnx does not exist"),
    ],
)
def test_wrong_uses(model, pictures, tmp_path, change, message):
    with pytest.raises(LiteDetrError, match=message):
        jobs.predict(**{"model": model, "sources": [pictures], "output": tmp_path / "out"} | change)
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_not_there(model, pictures, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for place in (address, f"ray://{address}"):
        began = time.monotonic()
        with pytest.raises(LiteDetrError, match=f"no Ray cluster at {place}: .*ray start --head"):
            jobs.predict(model, [pictures], tmp_path / "out", cluster=jobs.Cluster(place))
        assert time.monotonic() - began < 60  # Ray itself takes minutes
    with pytest.raises(LiteDetrError, match="The Ray cluster nonsense cannot be used: Invalid address"):
        jobs.predict(model, [pictures], tmp_path / "out", cluster=jobs.Cluster("nonsense"))
    assert not (tmp_path / "out").exists()


def command(model, source, output, address, *more):
    options = ["--ray", "--ray-address", address, "--shard-size", SHARD, "--batch-size", 4, *more]
    return [*COMMAND, *map(str, [model, source, "-o", output, *options])]


def written(folder):
    """Return what shows whether a shard was written again: file -> time of change."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*.parquet")}


def wait_for(condition, process):
    for _ in range(3000):
        if found := condition():
            return found
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def workers():
    """Return the process ids of the detectors' actors in a cluster that this process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(WORKER) and os.getpid() in ancestors(int(folder.name)):
                found.append(int(folder.name))
        except OSError:
            pass  # it has ended
    return found


def ancestors(process):
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        yield process


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_twice(detector, scenes, address, tmp_path):
    """The job is killed, its rerun loses a worker, and a third run finds nothing to do."""
    bad = scenes / "100-bad.png"
    bad.write_bytes((scenes / "100.png").read_bytes()[:2000])
    output, call = tmp_path / "out", command(detector, scenes, tmp_path / "out", address)

    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        wait_for(lambda: len(written(output)) >= 4, job)
        job.kill()
    first = written(output)
    assert 4 <= len(first) < SCENES // SHARD

    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        wait_for(lambda: len(written(output)) >= len(first) + 4, job)
        victim = workers()[0]
        os.kill(victim, signal.SIGKILL)
        killed_at = len(written(output))
        stdout, stderr = job.communicate()
    assert job.returncode == 0 and stdout.count("\n") == 1, stderr
    second = written(output)
    print(
        f"\njob killed after {len(first)} shards, worker {victim} killed after {killed_at} of {len(second)}; {stdout}"
    )
    assert killed_at < len(second) - 2
    assert {name: second[name] for name in first} == first
    assert f"continued: {len(first) * SHARD} of {SCENES + 1} images were done before" in stderr
    assert "1 images failed" in stderr

    third = subprocess.run(call, capture_output=True, text=True)
    assert third.returncode == 0 and written(output) == second

    manifest = json.loads((output / "manifest.json").read_text())
    assert {shard["file"] for shard in manifest["shards"]} == set(second)
    rows = [row for shard in manifest["shards"] for row in parquet.read_table(output / shard["file"]).to_pylist()]
    paths = sorted(path for path in scenes.glob("*.png") if path != bad)
    assert [row["image"] for row in rows] == list(map(str, paths)) and len(rows) == SCENES
    [failed] = map(json.loads, (output / "failed.jsonl").read_text().splitlines())
    assert failed["image"] == str(bad) and "cannot be read" in failed["error"] and failed["shard"] in second
    assert sorted(path.name for path in output.iterdir()) == sorted([*second, "manifest.json", "failed.jsonl"])

    plain = ld.Detector(detector, threads=1)
    largest = 0.0
    for row, found in zip(rows, plain.predict(map(load_image, paths), threshold=0.3)):
        assert row["labels"] == found.labels.tolist() and row["names"] == found.names
        assert (row["width"], row["height"]) == SIZE
        np.testing.assert_allclose(row["scores"], found.scores, atol=1e-4)
        boxes = np.array(row["boxes"], np.float32).reshape(-1, 4)
        np.testing.assert_allclose(boxes, found.boxes, atol=0.01)
        largest = max(largest, np.abs(boxes - found.boxes).max(initial=0))
    objects = Counter(name for row in rows for name in row["names"])
    assert len(objects) == 10  # of every class some
    print(f"{sum(objects.values())} objects on {len(rows)} images; boxes differ from the plain run's by {largest:.1g}")


@pytest.mark.slow
def test_coco_and_other_options(model, pictures, address, tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    options = {"cluster": jobs.Cluster(address, workers=1), "format": "coco", "shard_size": 3, "threshold": 0.1}
    report = jobs.predict(model, [pictures, f"{pictures}/more/**/*"], tmp_path / "out", **options)
    assert (report["images"], report["done"], report["failed"], report["shards"]) == (4, 4, 0, 2)
    numbers = []
    for path in sorted((tmp_path / "out").glob("[!m]*.json")):
        index = coco.COCO(str(path))
        numbers += index.getAnnIds()
        for image in index.loadImgs(index.getImgIds()):
            [plain] = ld.Detector(model).predict(image["file_name"], threshold=0.1)
            found = index.loadAnns(index.getAnnIds(image["id"]))
            assert [one["category_id"] for one in found] == plain.labels.tolist()
            assert [one["score"] for one in found] == pytest.approx(plain.scores.tolist())
            x, y, width, height = np.array([one["bbox"] for one in found]).T
            np.testing.assert_allclose(np.stack([x, y, x + width, y + height], 1), plain.boxes)
            assert all(index.cats[one["category_id"]]["name"] for one in found[:1])
    assert len(numbers) == len(set(numbers)) >= 4

    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(LiteDetrError, match="holds the shards of another job: threshold was 0.1 and is 0.2"):
        jobs.predict(model, [pictures, f"{pictures}/more/**/*"], tmp_path / "out", **options | {"threshold": 0.2})
    with pytest.raises(LiteDetrError, match="another job: images was"):
        jobs.predict(model, [pictures], tmp_path / "out", **options)
    assert sorted((tmp_path / "out").iterdir()) == before


@pytest.mark.slow
def test_what_the_cluster_cannot_do(model, pictures, address, tmp_path):
    save_detector(tmp_path / "dynamic.onnx", size=None)
    for changes, message in (
        ({"threads": 3}, "A worker needs 3 CPUs, and no machine of the Ray cluster has that many: 2"),
        ({"device": "cuda"}, "A worker needs 1 GPU"),
        ({"resize": "shortest_edge"}, "the model's is fixed at 64x96"),
        ({"model": tmp_path / "text.onnx"}, "is not an ONNX model"),
    ):
        (tmp_path / "text.onnx").write_text("text")
        arguments = {"model": model, "sources": [pictures], "output": tmp_path / "out"} | changes
        with pytest.raises(LiteDetrError, match=message):
            jobs.predict(**arguments, cluster=jobs.Cluster(address))
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_interrupted(detector, scenes, address, tmp_path):
    output = tmp_path / "out"
    with subprocess.Popen(
        command(detector, scenes, output, address), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        wait_for(lambda: len(written(output)) >= 2, job)
        job.send_signal(signal.SIGINT)
        _, stderr = job.communicate()
    assert job.returncode == 130, stderr
    done = len(written(output)) * SHARD
    assert f"interrupted; {done} of " in stderr and "the same command continues" in stderr
    assert not list(output.glob(".*"))


@pytest.mark.slow
def test_an_image_that_ends_every_process(model, address):
    options = Options(image_size=(64, 96), resize="stretch")
    run = jobs.evaluator(jobs.Cluster(address, workers=1))
    with pytest.raises(LiteDetrError, match="ended, 4 times with the same images"):
        list(run(model, options, {}, lambda entry: os._exit(1), ["an image"]))


@pytest.mark.slow
def test_evaluate(detector, address, monkeypatch, tmp_path):
    pytest.importorskip("pycocotools")
    from litedetr_deploy.evaluate import evaluate
    from litedetr_deploy.evaluate.data import drawn_shapes

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = drawn_shapes(24)  # of 256x256, stretched to the model
    plain = evaluate.evaluate(detector, data, batch_size=2)
    on_ray = evaluate.evaluate(detector, data, batch_size=2, elsewhere=jobs.evaluator(jobs.Cluster(address)))
    assert on_ray.metrics == pytest.approx(plain.metrics, abs=1e-4) and plain.metrics["AP"] > 0.2
    for image, found in plain.detections.items():
        np.testing.assert_allclose(on_ray.detections[image].boxes, found.boxes, atol=0.05)
        np.testing.assert_allclose(on_ray.detections[image].scores, found.scores, atol=1e-4)
    assert on_ray.latency_ms["median"] > 0 and on_ray.batch_size == 2


@pytest.mark.slow
def test_a_bucket(model, pictures, monkeypatch):
    """Images and shards in S3, whose protocol moto's server speaks; the cluster is a new one on this machine."""
    server = pytest.importorskip("moto.server", reason="needs moto[server]").ThreadedMotoServer("127.0.0.1", 0)
    from pyarrow import fs

    server.start()
    host, port = server.get_host_and_port()
    options = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1&allow_bucket_creation=true"
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "RAY_ADDRESS": "local"}.items():
        monkeypatch.setenv(name, value)
    try:
        bucket, path = fs.FileSystem.from_uri(f"s3://bucket?{options}")
        bucket.create_dir(path)
        fs.copy_files(str(pictures), "bucket/my pictures", destination_filesystem=bucket)
        source, output = f"s3://bucket/my pictures/**/*.[jp]*?{options}", f"s3://bucket/found?{options}"
        report = jobs.predict(model, [source], output, shard_size=2)
        assert (report["done"], report["continued"], report["shards"]) == (3, 0, 2)
        found = [info.path for info in bucket.get_file_info(fs.FileSelector("bucket/found"))]
        shards = sorted(path for path in found if path.endswith(".parquet"))
        assert sorted(found) == sorted([*shards, "bucket/found/manifest.json"])
        rows = [row for path in shards for row in parquet.read_table(path, filesystem=bucket).to_pylist()]
        assert [row["image"].removeprefix("s3://bucket/my pictures/") for row in rows] == [
            "a.jpg",
            "b.png",
            "more/c.png",
        ]
        assert all(row["labels"][0] == 18 and row["names"][0] == "dog" for row in rows)
        bucket.delete_file(shards[1])
        report = jobs.predict(model, [source], output, shard_size=2)
        assert (report["done"], report["continued"]) == (1, 2)
    finally:
        server.stop()
