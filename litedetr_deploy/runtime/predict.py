"""Sources -> detector -> sink, at the same time: a thread decodes and resizes, one draws and encodes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ..errors import LiteDetrError, printable
from .detector import AHEAD, Detector
from .sinks import Sink
from .sources import Source, ahead

BEHIND = 4  # frames that wait to be written
SHOWN = 8  # objects that a line names


def predict(
    detector: Detector, sources: Sequence[Source], sink: Sink | None, threshold: float, resize: str | None = None,
    batch_size: int = 1, classes: Iterable[int | str] | None = None, max_detections: int | None = None,
) -> Generator[dict, None, None]:  # fmt: skip
    """Detect objects on each frame of the sources, write it to the sink, and yield its record.

    A record has path, size (width, height), seconds that it took from the decoded image to its detections, saved (the
    path of its drawing, or None) and detections (label, name, score, box); for a video frame, time (seconds from the
    first one) and count (of all frames, None where it is not known) besides.  That of a source that cannot be read, or
    breaks, has path and error.  When this is interrupted, or closed early, the files hold what was done so far.

    Raises LiteDetrError as `Detector.stream` does.
    """
    detector.resize_mode(resize)  # what is wrong here is wrong for every source
    done = 0
    waiting: deque = deque()  # of each frame that runs what `opened` gave and the time, or the record of an error
    writing: deque[tuple[dict, Future | None]] = deque()
    finished: bool | None = None

    def opened():
        for number, source in enumerate(sources):
            try:
                for frame in source.read():
                    began = time.perf_counter()
                    ready = detector.prepare(frame.image, resize)
                    yield number, frame, ready, time.perf_counter() - began
            except LiteDetrError as error:
                yield {"path": source.name, "error": str(error)}

    decoded = ahead(opened(), AHEAD)

    def images():
        for item in decoded:
            if isinstance(item, dict):
                waiting.append(item)
                continue
            number, frame, ready, seconds = item
            waiting.append((number, frame, time.perf_counter() - seconds))
            yield ready

    def failed():
        while waiting and isinstance(waiting[0], dict):
            writing.append((waiting.popleft(), None))

    def written(most: int):
        nonlocal done
        while writing and (len(writing) > most or writing[0][1] is None or writing[0][1].done()):
            record, job = writing.popleft()
            if job is not None:
                record["saved"] = job.result()
                done += sink is not None
            yield record

    pool = ThreadPoolExecutor(1, "litedetr-sink")
    try:
        found_on = detector.stream(images(), threshold, batch_size, classes=classes, max_detections=max_detections)
        for found in found_on:
            failed()
            number, frame, began = waiting.popleft()
            record = _record(frame, found, time.perf_counter() - began)
            writing.append((record, pool.submit(sink.add if sink else _nothing, number, frame, found, record)))
            yield from written(BEHIND)
        failed()
        yield from written(0)
        finished = True
    except (KeyboardInterrupt, GeneratorExit) as error:
        pool.shutdown()  # what waits is written: it is a few frames
        for _ in written(0):
            pass
        finished = True
        if isinstance(error, GeneratorExit):
            raise
        still = all(source.kind == "image" for source in sources)
        raise KeyboardInterrupt(
            f"{done} of {len(sources)} images were written" if still else f"{done} frames were written"
        ) from None
    finally:
        decoded.close()
        pool.shutdown()
        if sink:
            sink.close(bool(finished))


def _nothing(*arguments) -> None:
    pass


def _record(frame, found, seconds: float) -> dict:
    names = found.names or [None] * len(found)
    detections = [
        {"label": int(label), "name": name, "score": float(score), "box": [float(value) for value in box]}
        for label, name, score, box in zip(found.labels, names, found.scores, found.boxes)
    ]
    video = {"frame": frame.index, "time": frame.time, "count": frame.count}
    return {
        "path": frame.path, **(video if frame.index is not None else {}), "size": list(frame.image.size),
        "seconds": seconds, "saved": None, "detections": detections,
    }  # fmt: skip


def describe(record: dict) -> str:
    """Return one line on the record of an image."""
    found = record["detections"]
    objects = ", ".join(f"{one['name'] or 'class ' + str(one['label'])} {one['score']:.2f}" for one in found[:SHOWN])
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    count = f"{len(found)} object{'s' * (len(found) != 1)}{': ' if found else ''}"
    return printable(f"{record['path']}: {count}{objects}{more} ({record['seconds'] * 1000:.0f} ms)")
