"""litedetr predict: what is on these images?"""

import statistics
import sys
import time
from pathlib import Path

import typer

from ..artifact import check_file
from ..errors import LiteDetrError, printable
from ._console import print_json


def predict(
    model: Path,
    images: list[Path],
    output: Path | None = None,
    threshold: float = 0.3,
    resize: str | None = None,
    runtime: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    as_json: bool = False,
):
    """Detect objects on images, print them, and save the images with boxes.

    An image that cannot be read is reported and left out; the exit status is then 2.
    """
    from ..runtime.detector import Detector
    from ..runtime.images import find_images
    from ..runtime.sinks import describe, drawing_paths, predict_files

    check_file(model, "the model")
    files = find_images(images)
    drawing_paths(files, output)  # before the model is loaded
    several = runtime == "openvino" and len(files) > 1
    detector = Detector(model, threads=threads, runtime=runtime, precision=precision, throughput=several)
    done, errors, began = [], [], time.monotonic()
    for record in predict_files(detector, files, output, threshold, resize):
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
