"""litedetr predict: what is on these images?"""

import statistics
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LiteDetrError, printable
from . import _checks
from ._console import guarded, print_json
from ._options import AsJson, Resize, Threads


@guarded
def predict(
    model: Annotated[
        Path,
        typer.Argument(help="ONNX model that `litedetr export` made, or engine (.plan) that `litedetr build` made."),
    ],
    images: Annotated[list[Path], typer.Argument(help="Images, or directories of images.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Where to save the images with boxes: a directory, or for one image a file."
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Lowest score that counts.")] = 0.3,
    resize: Resize = None,
    threads: Threads = None,
    as_json: AsJson = False,
):
    """Detect objects on images, print them, and save the images with boxes.

    An image that cannot be read is reported and left out; the exit status is then 2.
    """
    from ..runtime.detector import Detector
    from ..runtime.images import find_images
    from ..runtime.sinks import describe, drawing_paths, predict_files

    _checks.readable_file(model, "model")
    files = find_images(images)
    drawing_paths(files, output)  # before the model is loaded
    done, errors = [], []
    for record in predict_files(Detector(model, threads=threads), files, output, threshold, resize):
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
        print(f"{len(done)} image{'s' * (len(done) != 1)}, median {median * 1000:.0f} ms each{saved}")
    if errors:
        raise typer.Exit(LiteDetrError.exit_status)
