"""litedetr predict: what is on these images?"""

import contextlib
import statistics
import sys
import time
from pathlib import Path

import typer

from ..artifact import check_file
from ..errors import LiteDetrError, printable
from ._console import Stages, print_json


def predict(
    model: Path,
    images: list[str],
    output: str | None = None,
    threshold: float = 0.3,
    resize: str | None = None,
    runtime: str | None = None,
    precision: str | None = None,
    provider: list[str] | None = None,
    threads: int | None = None,
    ray: bool = False,
    ray_address: str | None = None,
    workers: int | None = None,
    batch_size: int = 1,
    shards: str = "parquet",
    shard_size: int = 256,
    as_json: bool = False,
):
    """Detect objects on images, print them, and save the images with boxes.

    An image that cannot be read is reported and left out; the exit status is then 2.
    """
    if ray:
        _predict_on_ray(
            model, images, output, (ray_address, workers), as_json, threshold=threshold, resize=resize, runtime=runtime,
            precision=precision, format=shards, shard_size=shard_size, batch_size=batch_size,
            providers=provider or None, threads=threads,
        )  # fmt: skip
        return
    from ..runtime.detector import Detector
    from ..runtime.images import find_images
    from ..runtime.sinks import describe, drawing_paths, predict_files

    check_file(model, "the model")
    files = find_images(images)
    folder = Path(output) if output else None
    drawing_paths(files, folder)  # before the model is loaded
    several = runtime == "openvino" and len(files) > 1
    detector = Detector(model, provider or None, threads, runtime=runtime, precision=precision, throughput=several)
    done, errors, began = [], [], time.monotonic()
    for record in predict_files(detector, files, folder, threshold, resize):
        if "error" in record:
            errors.append(record["error"])
            print(f"error: {printable(record['error'])}", file=sys.stderr)
        else:
            done.append(record)
            if not as_json:
                print(describe(record), flush=True)
    if as_json:
        print_json({"model": str(model), "threshold": threshold, "images": done, "errors": errors})
    elif done:
        median = statistics.median(record["seconds"] for record in done)
        saved = f", images in {printable(output)}" if output else ""
        rate = f", {len(done) / (time.monotonic() - began):.1f} images/s, several at a time" if several else ""
        print(f"{len(done)} image{'s' * (len(done) != 1)}, median {median * 1000:.0f} ms each{rate}{saved}")
    if errors:
        raise typer.Exit(LiteDetrError.exit_status)


def _predict_on_ray(model, images, output, cluster, as_json, **options):
    from ..serve.ray import FAILED, Cluster, predict

    if output is None:
        raise LiteDetrError("A job on a Ray cluster writes shards: give their folder with --output.")
    with Stages() as stage, contextlib.redirect_stdout(sys.stderr):  # where Ray says that workers ended
        report = predict(model, images, output, cluster=Cluster(*cluster), progress=stage, **options)
    if as_json:
        print_json(report)
        return
    if report["failed"]:
        print(f"warning: {report['failed']} images failed, listed in {printable(output)}/{FAILED}.", file=sys.stderr)
    before = f", {report['continued']} of them were done before" if report["continued"] else ""
    print(
        f"{report['images']} images in {report['shards']} shards in {printable(output)}{before}; "
        f"{report['done']} in {report['seconds']:.0f} s"
    )
