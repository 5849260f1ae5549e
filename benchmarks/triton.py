"""A load on a Triton server: requests from several clients at a time, each answer compared with the detector's own.

    python -m benchmarks.triton MODEL.onnx [--requests 200] [--clients 8] [--protocol grpc] [--instances 1]

writes a repository of MODEL with `litedetr serve triton`, starts the server of nvidia-pytriton on it, sends JPEG files,
and prints throughput, latency, what was lost, and the server's memory.  Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import litedetr_deploy as ld
from litedetr_deploy.assets import shapes
from litedetr_deploy.serve.triton import write_repository
from tests.serve.client import Client, largest_difference
from tests.serve.server import serving

SCENES = 8
TOLERANCE = 1e-3  # of scores, and of boxes in widths of the image; a wrong answer is off by far more


def jpegs(count: int, size: tuple[int, int] = (256, 256)) -> list[bytes]:
    files = []
    for index in range(count):
        file = io.BytesIO()
        shapes.scene(index, 1, size)[0].save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    return files


def measure(server, protocol: str, model: str, files: list[bytes], wanted, requests: int, clients: int) -> dict:
    """Send `requests` from `clients` threads; return the figures."""
    seconds: list[float] = []
    lost: list[str] = []
    numbers, lock = iter(range(requests)), threading.Lock()

    def take():
        with lock:
            return next(numbers, None)

    def work():
        with Client(server, protocol) as client:
            while (number := take()) is not None:
                began, wrong = time.perf_counter(), ""
                try:
                    answer = client.detect(model, {"image": np.array([[files[number % len(files)]]], object)})
                    seconds.append(time.perf_counter() - began)
                    if (difference := largest_difference(answer, wanted[number % len(files)])) > TOLERANCE:
                        wrong = f"request {number} differs by {difference:.1e}"
                except Exception as error:
                    wrong = f"request {number}: {error}"
                if wrong:
                    lost.append(wrong)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = time.perf_counter() - began
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return {"rate": requests / whole, "p50": p50, "p99": p99, "answers": requests - len(lost), "lost": lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="the memory is read after each")
    parser.add_argument("--protocol", choices=["http", "grpc"], default="http")
    parser.add_argument("--instances", type=int, default=1)
    options = parser.parse_args()
    files, detector = jpegs(SCENES), ld.Detector(options.model)
    wanted = [next(detector.stream([file], clip=False)) for file in files]
    del detector
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        write_repository(options.model, repository, name="detector", instances=options.instances)
        with serving(repository, Path(folder)) as server:
            print(f"memory of the server, models loaded: {server.memory() / 1e6:.0f} MB")
            for _ in range(options.rounds):
                load = options.requests, options.clients
                found = measure(server, options.protocol, "detector_jpeg", files, wanted, *load)
                print(
                    f"{options.protocol}, {found['answers']} of {options.requests} requests answered rightly, from "
                    f"{options.clients} clients: {found['rate']:.1f} a second, p50 {found['p50']:.0f} ms, p99 "
                    f"{found['p99']:.0f} ms; memory {server.memory() / 1e6:.0f} MB"
                )
                for text in found["lost"][:5]:
                    print(f"  {text}")


if __name__ == "__main__":
    main()
