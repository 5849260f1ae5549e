"""litedetr predict: what is on these pictures?"""

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LiteDetrError
from . import _checks
from ._console import guarded, print_json

BAD_INPUT = LiteDetrError.exit_status


@guarded
def predict(
    model: Annotated[
        Path,
        typer.Argument(help="ONNX model that `litedetr export` made, or engine (.plan) that `litedetr build` made."),
    ],
    images: Annotated[list[Path], typer.Argument(help="Pictures, or directories of pictures.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Where to save the pictures with boxes: a directory, or for one image a file."
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Lowest score that counts.")] = 0.3,
    resize: Annotated[
        str | None,
        typer.Option(
            help="How an image becomes the model's input: shortest_edge, stretch or letterbox; by default what the model "
            "was exported for."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default one a core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the detections as JSON.")] = False,
):
    """Detect objects on pictures, print them and save the pictures with boxes.

    A picture that cannot be read is reported and left out; the exit status is then 2.
    """
    from ..runtime.detector import Detector
    from ..runtime.draw import draw, save
    from ..runtime.images import find_images, load_image

    _checks.readable_file(model, "model")
    files = find_images(images)
    targets = _targets(files, output)
    detector = Detector(model, threads=threads)

    done, errors = [], []
    try:
        for file, target in zip(files, targets):
            try:
                image = load_image(file)
            except LiteDetrError as error:
                errors.append(str(error))
                print(f"error: {error}", file=sys.stderr)
                continue
            began = time.perf_counter()
            [found] = detector.predict(image, threshold, resize=resize)
            seconds = time.perf_counter() - began
            if target:
                target.parent.mkdir(parents=True, exist_ok=True)
                save(draw(image, found), target)
            done.append(_record(file, image, found, seconds, target))
            if not as_json:
                print(_line(done[-1]), flush=True)
    except KeyboardInterrupt:
        written = sum(record["saved"] is not None for record in done)
        raise KeyboardInterrupt(f"{written} of {len(files)} pictures were written") from None

    if as_json:
        print_json({"model": str(model), "threshold": threshold, "images": done, "errors": errors})
    elif done:
        milliseconds = sorted(record["seconds"] * 1000 for record in done)
        saved = f", pictures in {output}" if output else ""
        print(f"{len(done)} image{'s' * (len(done) != 1)}, median {milliseconds[len(done) // 2]:.0f} ms each{saved}")
    if errors:
        raise typer.Exit(BAD_INPUT)


def _targets(files, output):
    """Return where the drawn picture of each file goes, None for nowhere."""
    if output is None:
        return [None] * len(files)
    from ..runtime.images import SUFFIXES

    if output.suffix.lower() in SUFFIXES and not output.is_dir():
        if len(files) > 1:
            raise LiteDetrError(
                f"The output {output} is one picture, and there are {len(files)} images. Give a directory."
            )
        _checks.writable_directory(output.parent)
        targets = [output]
    else:
        existing = next(path for path in (output, *output.absolute().parents) if path.exists())
        _checks.writable_directory(existing)  # the rest is made when the first picture is there
        targets, used = [], Counter()
        for file in files:
            used[file.name] += 1  # pictures of one name can come from several directories
            number = f"-{used[file.name]}" if used[file.name] > 1 else ""
            suffix = file.suffix if file.suffix.lower() in SUFFIXES else ".png"
            targets.append(output / f"{file.stem}{number}{suffix}")
    originals = {file.resolve() for file in files}
    for target in targets:
        if target.resolve() in originals:
            raise LiteDetrError(f"The output {target} is one of the images itself. Choose another directory.")
    return targets


def _record(file, image, found, seconds, target):
    names = found.names or [None] * len(found)
    return {
        "path": str(file),
        "size": list(image.size),
        "seconds": seconds,
        "saved": str(target) if target else None,
        "detections": [
            {"label": int(label), "name": name, "score": float(score), "box": [float(value) for value in box]}
            for label, name, score, box in zip(found.labels, names, found.scores, found.boxes)
        ],
    }


def _line(record):
    found = record["detections"]
    objects = ", ".join(f"{one['name'] or 'class ' + str(one['label'])} {one['score']:.2f}" for one in found[:8])
    more = f", and {len(found) - 8} more" if len(found) > 8 else ""
    count = f"{len(found)} object{'s' * (len(found) != 1)}"
    return f"{record['path']}: {count}{': ' if found else ''}{objects}{more} ({record['seconds'] * 1000:.0f} ms)"
