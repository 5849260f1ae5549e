"""Video in and out, with PyAV: files, streams that are taken up again when they break, and annotated files."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..errors import LiteDetrError, Notice, not_installed
from ..files import replaced_when_done
from .images import Frame

SUFFIXES = {
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
    ".ogv", ".ts", ".webm", ".wmv",
}  # fmt: skip
WRITTEN = {".gif": "gif", ".mkv": "matroska", ".mov": "mov", ".mp4": "mp4"}  # suffix -> FFmpeg's name of the format

TRIES = 5  # to take up a broken stream
PAUSE = 1.0  # seconds before the first of them, doubled before each other
STEADY = 60.0  # seconds after which a stream that breaks again has all its tries again
TIMEOUT = 10.0  # seconds to open a stream, and for each read from it

_TICK = Fraction(1, 60000)  # s; MPEG-4 takes nothing finer than 1/65535
_UPRIGHT = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class Readable(Protocol):
    """What is enough of a binary file."""

    def read(self, size: int, /) -> bytes: ...


def import_av():
    """Return the `av` module, PyAV; raise LiteDetrError when it cannot be imported."""
    try:
        import av
    except ImportError as error:
        raise (not_installed(error, "Video") or error) from error
    return av


def read_video(
    file: str | Readable, name: str, is_stream: bool = False, container_format: str | None = None
) -> Iterator[Frame]:
    """Yield the frames of a video.

    file: a path, a URL, or a binary file, which need not be seekable.
    name: what messages and the frames call it.
    is_stream: it comes from a network or a camera.  When it breaks it is opened again, at most TRIES times without
        STEADY seconds between two breaks, with a `Notice` each; a recording, whose length is known, goes on where it
        broke.
    container_format: FFmpeg's name of the format, where it cannot be found out.

    Raises LiteDetrError where it cannot be opened or holds no video, and where it breaks for good.
    """
    av = import_av()
    count, last, tries = 0, 0.0, 0  # frames so far, the time of the last one
    while True:
        began, before, rate, length = time.monotonic(), count, 25.0, None
        try:
            options = {"rtsp_transport": "tcp"} if name.startswith("rtsp") else {}
            timeout = TIMEOUT if is_stream else None
            with av.open(file, format=container_format, options=options, timeout=timeout) as container:
                if not container.streams.video:
                    raise LiteDetrError(f"{name} holds no video. Give a file or a stream that does.")
                stream = container.streams.video[0]
                rate = float(stream.average_rate or stream.guessed_rate or rate)
                length = container.duration / av.time_base if (container.duration or 0) > 0 else None
                again = before > 0 and length is not None  # a recording that is read from its beginning again
                offset = last + 1 / rate if before and not again else 0.0
                first = None
                for number, picture in enumerate(_decode(av, container, stream)):
                    at = number / rate if picture.time is None else picture.time
                    first = at if first is None else first
                    at += offset - first
                    if again and at <= last:
                        continue
                    total = stream.frames or (round(length * rate) if length else None)
                    yield Frame(_upright(picture), name, count, at, rate, total)
                    count, last = count + 1, at
            # A live stream without HTTP's own end has no other end than a break.
            if length is not None or not is_stream or name.startswith("http"):
                if count == 0:
                    raise LiteDetrError(f"{name} holds no frame that can be decoded. Check that it plays elsewhere.")
                return
            said = "it ended"
        except (av.error.FFmpegError, OSError) as error:
            if count and length is not None and last + 2 / rate >= length:
                return  # some servers end with an error
            said = getattr(error, "strerror", None) or str(error)
        if not is_stream:
            where = f"beyond frame {count}" if count else "as a video"
            fix = "It may be damaged or incomplete: check that it plays elsewhere, or leave it out."
            raise LiteDetrError(f"{name} cannot be read {where}: {said}. {fix}")
        if count == 0 and tries == 0:
            fix = "Check the address, that the other side is up, and that it can be reached from here."
            raise LiteDetrError(f"{name} cannot be opened: {said}. {fix}")
        if time.monotonic() - began > STEADY or (length is not None and count > before):
            tries = 0
        if tries == TRIES:
            raise LiteDetrError(
                f"{name} broke after {count} frames ({said}), and {TRIES} tries to take it up again failed. Check that "
                "the other side is up, and run the command again."
            )
        pause = PAUSE * 2**tries
        tries += 1
        what = f"{name} broke after {count} frames ({said}); try {tries} of {TRIES} to take it up again in {pause:g} s"
        warnings.warn(what, Notice, 2)
        time.sleep(pause)


def _decode(av, container, stream) -> Iterator[Any]:
    """Yield the pictures of a stream, also those that the decoder still holds when the container fails; what cannot be
    decoded is left out, as every player does."""
    stream.thread_type = "AUTO"
    try:
        for packet in container.demux(stream):
            with contextlib.suppress(av.error.InvalidDataError):
                yield from packet.decode()
    except av.error.FFmpegError:
        with contextlib.suppress(av.error.FFmpegError):
            for picture in stream.codec_context.decode(None):
                picture.time_base = stream.time_base  # PyAV takes it from the packet, and there is none
                yield picture
        raise


def _upright(picture) -> Image.Image:
    image = picture.to_image()
    turn = _UPRIGHT.get(round(picture.rotation) % 360)
    return image if turn is None else image.transpose(turn)


class VideoWriter:
    """Writes frames into the video file `path`, of a suffix in WRITTEN.

    It is H.264 (MPEG-4 Part 2 where PyAV has no encoder for it), for which an odd size gets a row or column more, or
    GIF.  The file has its name only after `close`.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: float):
        av = import_av()
        self._av, self._size, self._last = av, size, -1
        self._open = contextlib.ExitStack()
        temporary = self._open.enter_context(replaced_when_done(path))
        suffix = path.suffix.lower()
        codec, layout = ("gif", "rgb8") if suffix == ".gif" else (_h264(av), "yuv420p")
        with self._dropped_if_it_fails():
            self._container = self._open.enter_context(av.open(str(temporary), "w", format=WRITTEN[suffix]))
            options = {"preset": "veryfast"} if codec == "libx264" else {}
            self._stream = self._container.add_stream(codec, Fraction(rate).limit_denominator(1001), options)
            self._added = (0, 0) if codec == "gif" else (size[0] % 2, size[1] % 2)
            self._stream.width, self._stream.height = size[0] + self._added[0], size[1] + self._added[1]
            self._stream.pix_fmt, self._stream.codec_context.time_base = layout, _TICK
            if codec == "mpeg4":
                self._stream.bit_rate = 4 * size[0] * size[1]  # bit/s; its own 200 kbit/s are not enough for anything

    def add(self, image: Image.Image, seconds: float) -> None:
        """Append an RGB image, to be shown from `seconds` after the first one; one of another size is resized."""
        if image.size != self._size:
            image = image.resize(self._size)
        columns, rows = self._added
        pixels = np.pad(np.asarray(image), ((0, rows), (0, columns), (0, 0)), mode="edge")
        frame = self._av.VideoFrame.from_ndarray(pixels, "rgb24")
        frame.time_base, frame.pts = _TICK, max(round(seconds / _TICK), self._last + 1)
        self._last = frame.pts
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file, which can be played then however few frames it has."""
        with self._dropped_if_it_fails():
            self._container.mux(self._stream.encode(None))
        self._open.close()

    def drop(self) -> None:
        """Leave nothing of the file."""
        error = LiteDetrError("dropped")
        self._open.__exit__(LiteDetrError, error, None)

    @contextlib.contextmanager
    def _dropped_if_it_fails(self):
        try:
            yield
        except BaseException:
            self.drop()
            raise


def _h264(av) -> str:
    return "libx264" if "libx264" in av.codecs_available else "mpeg4"
