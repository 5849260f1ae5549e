"""litedetr predict: what is on these images and videos?"""

import contextlib
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import typer

from ..artifact import check_file
from ..errors import LiteDetrError, printable
from ._console import Stages, print_json


def predict(
    model: Path,
    images: list[str],
    output: str | None = None,
    format: str | None = None,
    threshold: float = 0.3,
    classes: str | None = None,
    max_detections: int | None = None,
    recursive: bool = False,
    resize: str | None = None,
    batch_size: int = 1,
    device: str | None = None,
    runtime: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    ray: bool = False,
    ray_address: str | None = None,
    workers: int | None = None,
    shard_size: int | None = None,
    as_json: bool = False,
):
    """Detect objects on images and videos, print them, and save the images and videos with boxes, or the objects.

    An image or a video that cannot be read is reported and left out; the exit status is then 2.  Ctrl-C finishes the
    files: they hold what was done so far.
    """
    of_ray = {"ray_address": ray_address, "workers": workers, "shard_size": shard_size}
    of_others = {"classes": classes, "max_detections": max_detections, "recursive": recursive}
    for name, value in (of_others if ray else of_ray).items():
        if value:
            flag, why = f"--{name.replace('_', '-')}", "not for" if ray else "for"
            fix = f"Leave out {flag} or --ray." if ray else "Add --ray, or leave it out."
            raise LiteDetrError(f"{flag} is {why} jobs on a Ray cluster. {fix}")
    if ray:
        options = {
            "threshold": threshold, "resize": resize, "runtime": runtime, "precision": precision, "device": device,
            "batch_size": batch_size, "threads": threads, "format": format or "parquet",
        }  # fmt: skip
        options |= {"shard_size": shard_size} if shard_size else {}
        _predict_on_ray(model, images, output, (ray_address, workers), as_json, options)
        return
    from ..runtime.detector import Detector
    from ..runtime.predict import describe
    from ..runtime.predict import predict as run
    from ..runtime.sinks import open_sink
    from ..runtime.sources import find_sources

    check_file(model, "the model")
    sources = find_sources(images, recursive)
    sink = open_sink(Path(output) if output else None, format, sources)  # before the model is loaded
    to_stdout = sink is not None and output is None
    if to_stdout and as_json:
        raise LiteDetrError(f"--json and --format {format} both go to standard output. Give -o, or leave one out.")
    stills = all(source.kind == "image" for source in sources)
    several = runtime == "openvino" and (len(sources) > 1 or not stills)
    detector = Detector(model, threads=threads, runtime=runtime, precision=precision, throughput=several, device=device)
    wanted = None if classes is None else detector.find_labels(classes.split(","))
    records = run(detector, sources, sink, threshold, resize, batch_size, wanted, max_detections)
    quiet = as_json or to_stdout
    done, errors, seconds, began = [], [], [], time.monotonic()
    with contextlib.closing(records), contextlib.nullcontext(_ignore) if stills else Stages() as stage:
        video = None  # that is running
        for record in records:
            if video and not (video.path == record["path"] and record.get("frame")):
                video = video.end(quiet)
            if "error" in record:
                errors.append(record["error"])
                print(f"error: {printable(record['error'])}", file=sys.stderr)
                continue
            seconds.append(record["seconds"])
            if as_json:
                done.append(record)
            if "frame" in record:
                video = video or _Video(record["path"])
                video.add(record)
                stage(record["path"], record["frame"] + 1, record["count"])
            elif not quiet:
                print(describe(record), flush=True)
        if video:
            video.end(quiet)
    if as_json:
        print_json({"model": str(model), "threshold": threshold, "images": done, "errors": errors})
    elif seconds and not quiet:
        median, many = statistics.median(seconds), several or not stills
        noun = "image" if stills else "frame"
        saved = f", {'images' if stills else 'all'} in {printable(output)}" if output else ""
        parallel = ", several at a time" if several else ""
        rate = f", {len(seconds) / (time.monotonic() - began):.1f} {noun}s/s{parallel}" if many else ""
        print(f"{len(seconds)} {noun}{'s' * (len(seconds) != 1)}, median {median * 1000:.0f} ms each{rate}{saved}")
    if errors:
        raise typer.Exit(LiteDetrError.exit_status)


def _ignore(*arguments):
    pass


class _Video:
    """What was found on a video so far."""

    def __init__(self, path):
        self.path, self._began, self._frames, self._objects = path, time.monotonic(), 0, Counter()

    def add(self, record):
        self._frames += 1
        self._objects.update(one["name"] or f"class {one['label']}" for one in record["detections"])

    def end(self, quiet):
        """Print a line on the video unless `quiet`."""
        if not quiet:
            rate = self._frames / (time.monotonic() - self._began)
            objects = ", ".join(f"{name} {count}" for name, count in self._objects.most_common(8))
            found = f"{self._objects.total()} objects{': ' * bool(objects)}{objects}"
            frames = f"{self._frames} frame{'s' * (self._frames != 1)}"
            print(printable(f"{self.path}: {frames}, {found} ({rate:.1f} frames/s)"), flush=True)


def _predict_on_ray(model, images, output, cluster, as_json, options):
    from ..serve.ray import Cluster, predict
    from ..serve.shards import FAILED

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
