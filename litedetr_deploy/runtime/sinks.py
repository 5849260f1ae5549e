"""Where predictions go: drawn images and videos, JSON lines, COCO results, CSV and YOLO text."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import sys
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TextIO

import numpy as np

from ..errors import LiteDetrError, nearest
from ..files import check_writable, replaced_when_done
from .detector import Detections
from .draw import draw, save
from .images import SUFFIXES, Frame
from .sources import Source
from .video import WRITTEN, VideoWriter, import_av

FORMATS = ("pictures", "jsonl", "coco", "csv", "yolo")
TEXT_SUFFIXES = {".jsonl": "jsonl", ".json": "coco", ".csv": "csv"}
CSV_COLUMNS = ("path", "frame", "time", "label", "name", "score", "x1", "y1", "x2", "y2")
# What stands before, between and after the lines.
_AROUND = {"jsonl": ("", "", ""), "coco": ("[\n", ",\n", "\n]\n"), "csv": (",".join(CSV_COLUMNS) + "\n", "", "")}


class Sink(Protocol):
    """Takes the frames of sources, by the number of each, in their order."""

    def add(self, number: int, frame: Frame, found: Detections, record: dict) -> str | None:
        """Write one frame; return the path of the drawing with it, if there is one.  `record` is that of `predict`."""

    def close(self, done: bool) -> None:
        """Give the files that are not finished their names, or with `done` False leave nothing of them."""


def open_sink(output: Path | None, format: str | None, sources: Sequence[Source]) -> Sink | None:
    """Return what writes the predictions on `sources`; None where nothing is to be written.

    output: of the format 'pictures', and of none, a directory, which is made when the first drawing is there, or one
        file for one source; of 'jsonl', 'coco' and 'csv' a file, or None for standard output; of 'yolo' a directory.
    format: one of FORMATS.  Not given, it follows from the suffix of `output`: .jsonl, .json (COCO results) and .csv;
        else images are drawn, and videos as videos.  With 'pictures' each frame of a video is an image.

    Raises LiteDetrError where they do not fit, where `output` cannot be written, and where it is one of the sources.
    """
    if format not in (None, *FORMATS):
        raise LiteDetrError(
            f"The format is {format!r}; it must be one of {', '.join(FORMATS)}.{nearest(format, FORMATS)}"
        )
    if output is None:
        if format in ("pictures", "yolo"):
            raise LiteDetrError(f"The format {format!r} is files in a directory. Give it, as in `-o found/`.")
        return None if format is None else _Text(None, format, sources)
    format = format or (None if output.is_dir() else TEXT_SUFFIXES.get(output.suffix.lower()))
    if format in TEXT_SUFFIXES.values():
        if output.is_dir():
            raise LiteDetrError(f"The output {output} is a directory, and {format} is one file. Give its name.")
        check_writable(output.absolute().parent)
        _check_originals([output], sources)
        return _Text(output, format, sources)
    if format == "yolo":
        return _Yolo(output, sources)
    return _Drawings(output, sources, format == "pictures")


class _Names:
    """Paths in the directory `output`, one a source, that do not clash; they end in no suffix but the one asked for."""

    def __init__(self, output: Path, sources: Sequence[Source]):
        check_writable(next(path for path in (output, *output.absolute().parents) if path.exists()))
        self._output, self._sources, self._used = output, sources, set()
        self._given: dict[int, Path] = {}

    def of(self, number: int, suffix: str) -> Path:
        """Return the path of the source `number`: always the one with its first suffix."""
        if number not in self._given:
            stem, count = _stem(self._sources[number]), 1
            name = stem + suffix
            while name in self._used:  # those of one name can come from several folders
                count += 1
                name = f"{stem}-{count}{suffix}"
            self._used.add(name)
            self._given[number] = self._output / name
        return self._given[number]


class _Drawings:
    """Images and videos with boxes: `output` itself, or files in it."""

    def __init__(self, output: Path, sources: Sequence[Source], each_frame: bool):
        self._sources, self._each_frame = sources, each_frame
        self._writer: VideoWriter | None = None
        self._names, self._file, suffix = None, None, output.suffix.lower()
        if output.is_dir() or not suffix:
            self._names = _Names(output, sources)
            targets = [self._target(n, source.kind == "video") for n, source in enumerate(sources) if source.kind]
        elif suffix not in SUFFIXES | set(WRITTEN):
            raise LiteDetrError(
                f"The output {output} has the suffix {output.suffix!r}, which is no image format, no video format and "
                f"no format of text: give one of {', '.join(sorted(SUFFIXES))} for an image, of "
                f"{', '.join(sorted(WRITTEN))} for a video, of {', '.join(TEXT_SUFFIXES)} for text, or make the folder "
                "first if it is one."
            )
        elif len(sources) > 1:
            what = "image" if suffix in SUFFIXES else "video"
            many = "images" if all(source.kind == "image" for source in sources) else "sources"
            raise LiteDetrError(
                f"The output {output} is one {what}, and there are {len(sources)} {many}. Give a directory."
            )
        else:
            check_writable(output.absolute().parent)
            self._file, targets = output, [output]
            if sources[0].kind:
                self._check_kind(sources[0].kind == "video")
        if any(source.kind == "video" for source in sources) and not each_frame:
            import_av()
        _check_originals(targets, sources)

    def add(self, number, frame, found, record):
        is_video = frame.index is not None
        target = self._target(number, is_video)
        if is_video and self._each_frame:
            target = target / f"{frame.index:06}.jpg"
        if not is_video or self._each_frame:
            self._finish_video()
            target.parent.mkdir(parents=True, exist_ok=True)
            save(draw(frame.image, found), target)
            return str(target)
        if frame.index == 0:
            self._finish_video()
            target.parent.mkdir(parents=True, exist_ok=True)
            self._writer = VideoWriter(target, frame.image.size, frame.rate)
        self._writer.add(draw(frame.image, found), frame.time)
        return str(target)

    def close(self, done):
        if done:
            self._finish_video()
        elif self._writer:
            self._writer.drop()

    def _finish_video(self):
        writer, self._writer = self._writer, None
        if writer:
            writer.close()

    def _target(self, number: int, is_video: bool) -> Path:
        """Return the path of the drawing of a source; of each frame of a video, that of their directory."""
        source = self._sources[number]
        if self._file:
            if source.kind is None:
                self._check_kind(is_video)
            return self._file
        suffix = Path(source.name).suffix if source.file else ""
        if is_video:
            suffix = "" if self._each_frame else ".gif" if suffix.lower() == ".gif" else ".mp4"
        elif suffix.lower() not in SUFFIXES:
            suffix = ".png"
        target = self._names.of(number, suffix)
        if source.kind is None:
            _check_originals([target], self._sources)
        return target

    def _check_kind(self, is_video: bool) -> None:
        """Raise LiteDetrError unless the one file that is to be written fits its source."""
        name, output, suffix = self._sources[0].name, self._file, self._file.suffix.lower()
        if is_video and self._each_frame:
            raise LiteDetrError(f"The output {output} is one file, and {name} is a video. Give a directory.")
        if is_video and suffix not in WRITTEN:
            known = ", ".join(sorted(WRITTEN))
            raise LiteDetrError(
                f"The output {output} is an image, and {name} is a video. Give one of {known}, or a directory."
            )
        if not is_video and suffix not in SUFFIXES:
            raise LiteDetrError(f"The output {output} is a video, and {name} is an image. Give .jpg or .png.")


class _Text:
    """One text file, or standard output: a line a frame (jsonl) or an object (coco, csv)."""

    def __init__(self, output: Path | None, format: str, sources: Sequence[Source]):
        self._output, self._lines = output, {"jsonl": _json_line, "coco": self._coco_lines, "csv": _csv_lines}[format]
        self._before, self._between, self._after = _AROUND[format]
        self._open = contextlib.ExitStack()
        self._file: TextIO | None = None
        self._count = 0
        stems = [_stem(source) for source in sources if source.kind == "image"]
        self._numbered = len(set(stems)) == len(stems) == len(sources) and all(map(str.isdecimal, stems))

    def add(self, number, frame, found, record):
        if self._file is None:
            self._file = sys.stdout
            if self._output:
                temporary = self._open.enter_context(replaced_when_done(self._output))
                self._file = self._open.enter_context(temporary.open("w", encoding="utf-8", newline=""))
            self._file.write(self._before)
        for line in self._lines(record):
            self._file.write((self._between if self._count else "") + line)
            self._count += 1
        self._file.flush()

    def close(self, done):
        if not done:
            error = LiteDetrError("dropped")
            self._open.__exit__(LiteDetrError, error, None)
        elif self._file:
            self._file.write(self._after)
            self._file.flush()
            self._open.close()

    def _coco_lines(self, record: dict) -> Iterator[str]:
        """COCO's results.  The id of an image is the number that its file is named by, where all are named so, as
        COCO's own are; else its path, with # and the number of the frame for a video."""
        path = record["path"]
        identity = int(Path(path).stem) if self._numbered else path
        if "frame" in record:
            identity = f"{path}#{record['frame']}"
        for one in record["detections"]:
            left, top, right, bottom = one["box"]
            box = [left, top, right - left, bottom - top]
            yield json.dumps({"image_id": identity, "category_id": one["label"], "bbox": box, "score": one["score"]})


def _json_line(record: dict) -> Iterator[str]:
    yield json.dumps({key: value for key, value in record.items() if key not in ("saved", "count")}) + "\n"


def _csv_lines(record: dict) -> Iterator[str]:
    place = record["path"], record.get("frame"), record.get("time")
    text = io.StringIO()
    rows = ((*place, one["label"], one["name"], one["score"], *one["box"]) for one in record["detections"])
    csv.writer(text, lineterminator="\n").writerows(rows)
    yield text.getvalue()


class _Yolo:
    """A text file a frame with a line an object: its label, the box's centre, width and height as fractions of the
    image's, and the score.  Those of a video are in a directory."""

    def __init__(self, output: Path, sources: Sequence[Source]):
        self._names = _Names(output, sources)

    def add(self, number, frame, found, record):
        target = self._names.of(number, ".txt" if frame.index is None else "")
        if frame.index is not None:
            target = target / f"{frame.index:06}.txt"
        boxes = found.boxes / np.tile(frame.image.size, 2)
        centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        rows = zip(found.labels, np.concatenate([centres, sides, found.scores[:, None]], axis=1))
        lines = [f"{label} {' '.join(f'{value:.6f}' for value in values)}\n" for label, values in rows]
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced_when_done(target) as temporary:
            temporary.write_text("".join(lines))

    def close(self, done):
        pass


def _stem(source: Source) -> str:
    """Return what the files made from a source are called, without a suffix."""
    if source.file:
        return source.file.stem
    parts = urllib.parse.urlsplit(source.name)
    name = Path(urllib.parse.unquote(parts.path)).stem or parts.hostname or ""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "source"  # never '..'


def _check_originals(targets: Iterable[Path], sources: Sequence[Source]) -> None:
    """Raise LiteDetrError for a target that is a source."""
    originals = {source.file.resolve() for source in sources if source.file}
    if target := next((target for target in targets if target.resolve() in originals), None):
        raise LiteDetrError(f"The output {target} is one of the images itself. Choose another directory.")
