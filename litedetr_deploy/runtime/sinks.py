"""Where predictions go: drawn images on disk, and records for programs and for people."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import LiteDetrError, printable
from ..files import check_writable
from .detector import Detector
from .draw import draw, save
from .images import SUFFIXES, load_image

SHOWN = 8  # objects that a line names


def predict_files(
    detector: Detector, files: Sequence[Path], output: Path | None, threshold: float, resize: str | None = None
) -> Iterator[dict]:
    """Detect objects on each file, save it with boxes, and yield its record; see `drawing_paths` for `output`.

    A record has path, size (width, height), seconds from the opened image to its detections, saved (a path or None) and
    detections (label, name, score, box); that of a file that cannot be read has path and error.
    """
    written = 0
    waiting: deque = deque()  # of each file that was opened its path, target, image and time, or what is wrong with it

    def images():
        for file, target in zip(files, drawing_paths(files, output)):
            try:
                image = load_image(file)
            except LiteDetrError as error:
                waiting.append({"path": str(file), "error": str(error)})
                continue
            waiting.append((file, target, image, time.perf_counter()))
            yield image

    def failed():
        while waiting and isinstance(waiting[0], dict):
            yield waiting.popleft()

    try:
        for found in detector.stream(images(), threshold, resize=resize):
            yield from failed()
            file, target, image, began = waiting.popleft()
            seconds = time.perf_counter() - began
            if target:
                target.parent.mkdir(parents=True, exist_ok=True)
                save(draw(image, found), target)
                written += 1
            names = found.names or [None] * len(found)
            detections = [
                {"label": int(label), "name": name, "score": float(score), "box": [float(value) for value in box]}
                for label, name, score, box in zip(found.labels, names, found.scores, found.boxes)
            ]
            yield {
                "path": str(file), "size": list(image.size), "seconds": seconds,
                "saved": str(target) if target else None, "detections": detections,
            }  # fmt: skip
        yield from failed()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{written} of {len(files)} images were written") from None


def drawing_paths(files: Sequence[Path], output: Path | None) -> list[Path | None]:
    """Return where the drawing of each file goes: `output` itself, or a file in it; None for nowhere.

    output: an image file for one image; else a folder, which is made when the first drawing is there.

    Raises LiteDetrError where `output` is neither, cannot be written, or is one of the images.
    """
    if output is None:
        return [None] * len(files)
    suffix = output.suffix.lower()
    if output.is_dir() or not suffix:
        check_writable(next(path for path in (output, *output.absolute().parents) if path.exists()))
        targets, used = [], Counter()
        for file in files:
            used[file.name] += 1  # images of one name can come from several folders
            number = f"-{used[file.name]}" if used[file.name] > 1 else ""
            targets.append(output / f"{file.stem}{number}{file.suffix if file.suffix.lower() in SUFFIXES else '.png'}")
    elif suffix not in SUFFIXES:
        raise LiteDetrError(
            f"The output {output} has the suffix {output.suffix!r}, which is no image format: give one of "
            f"{', '.join(sorted(SUFFIXES))} for a file, or make the folder first if it is one."
        )
    elif len(files) > 1:
        raise LiteDetrError(f"The output {output} is one image, and there are {len(files)} images. Give a directory.")
    else:
        check_writable(output.parent)
        targets = [output]
    originals = {file.resolve() for file in files}
    if target := next((target for target in targets if target.resolve() in originals), None):
        raise LiteDetrError(f"The output {target} is one of the images itself. Choose another directory.")
    return targets


def describe(record: dict) -> str:
    """Return one line on a record of `predict_files`."""
    found = record["detections"]
    objects = ", ".join(f"{one['name'] or 'class ' + str(one['label'])} {one['score']:.2f}" for one in found[:SHOWN])
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    count = f"{len(found)} object{'s' * (len(found) != 1)}{': ' if found else ''}"
    return printable(f"{record['path']}: {count}{objects}{more} ({record['seconds'] * 1000:.0f} ms)")
