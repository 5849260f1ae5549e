"""What predictions are made on: files, folders, patterns, URLs, cameras and standard input, as frames."""

from __future__ import annotations

import base64
import glob
import http.client
import os
import queue
import re
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..errors import LiteDetrError
from . import images, video
from .images import Frame, load_image, read_frames
from .video import read_video

SCHEMES = ("http", "https", "rtsp", "rtsps", "rtmp", "rtmps", "srt", "tcp", "udp", "rtp")
STDIN = "-"
LARGEST_DOWNLOAD = 256 << 20  # bytes of an image

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A file, URL, camera or standard input; `read()` opens it and yields its frames."""

    name: str  # what messages and records call it; without the password that a URL may hold
    kind: str | None  # 'image' or 'video'; None where only opening it tells
    read: Callable[[], Iterator[Frame]]
    file: Path | None = None


def find_sources(given, recursive: bool = False) -> list[Source]:
    """Return what `given` (one source, or several) stands for.

    given: paths of images and videos; directories, for the images and videos in them; patterns of paths (with **, of
        directories below as well); URLs of SCHEMES; the number of a camera; '-', an image or a video from standard
        input.
    recursive: take the directories in directories too.

    Raises LiteDetrError for a path that does not exist, and for a directory and a pattern with nothing to take.
    """
    found = []
    for one in [given] if isinstance(given, (str, os.PathLike, int)) else given:
        text = os.fspath(one) if isinstance(one, (str, os.PathLike)) else str(one)
        if text == STDIN:
            found.append(Source("standard input", None, _read_stdin))
        elif re.match(r"[A-Za-z][\w+.-]*://", text):
            found.append(_of_url(text))
        elif re.fullmatch(r"\d{1,3}", text, re.ASCII) and not os.path.exists(text):
            found.append(_camera(int(text)))
        elif os.path.isdir(text):
            found += map(_of_file, _inside(Path(text), recursive))
        elif glob.has_magic(text) and not os.path.exists(text):
            found += map(_of_file, _matching(text))
        elif os.path.isfile(text):
            found.append(_of_file(Path(text)))
        else:
            raise LiteDetrError(f"There is no image or video {text}: the path does not exist. Check it.")
    return found


def ahead(items: Iterable[T], count: int) -> Generator[T, None, None]:
    """Yield what `items` gives, in its order, taken by a thread at most `count` in advance; its errors are raised here.

    The thread ends with this generator, or with the process.
    """
    free, taken, stopped = threading.Semaphore(count), queue.SimpleQueue(), threading.Event()

    def take():
        iterator = iter(items)
        try:
            while free.acquire() and not stopped.is_set():
                taken.put((next(iterator), None))
        except BaseException as error:  # StopIteration as well
            taken.put((None, error))
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    threading.Thread(target=take, name="litedetr-ahead", daemon=True).start()
    try:
        while True:
            item, error = taken.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            free.release()
            yield item
    finally:
        stopped.set()
        free.release()


def _of_file(path: str | os.PathLike) -> Source:
    path, name = Path(path), str(path)
    if path.suffix.lower() in video.SUFFIXES:
        return Source(name, "video", lambda: read_video(name, name), path)
    if path.suffix.lower() == ".gif":
        return Source(name, "video" if images.is_animated(path) else "image", lambda: read_frames(path, name), path)
    return Source(name, "image", lambda: iter([Frame(load_image(path), name)]), path)


def _is_taken(path: Path) -> bool:
    return path.suffix.lower() in images.SUFFIXES | video.SUFFIXES and path.is_file()


def _inside(folder: Path, recursive: bool) -> list[Path]:
    found = sorted(filter(_is_taken, folder.rglob("*") if recursive else folder.iterdir()))
    if not found:
        suffixes = ", ".join(sorted(images.SUFFIXES | video.SUFFIXES))
        deeper = "" if recursive else ", take the directories in it with --recursive"
        raise LiteDetrError(
            f"The directory {folder} holds no image and no video ({suffixes}). Give one that does{deeper}, or name the "
            "files."
        )
    return found


def _matching(pattern: str) -> list[Path]:
    found = sorted(filter(_is_taken, map(Path, glob.glob(pattern, recursive=True))))
    if not found:
        raise LiteDetrError(f"The pattern {pattern} matches no image and no video. Check it, and the path before it.")
    return found


def _camera(number: int) -> Source:
    device = f"/dev/video{number}"
    if not os.path.exists(device):
        known = ", ".join(sorted(glob.glob("/dev/video*")))
        there = f"the cameras here are {known}" if known else "there is no camera here"
        raise LiteDetrError(f"The camera {number} does not exist: {device} is missing, and {there}. Connect it first.")
    return Source(device, "video", lambda: read_video(device, device, True, "v4l2"))


def _of_url(url: str) -> Source:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme.lower() not in SCHEMES or not parts.netloc:
        known = ", ".join(SCHEMES)
        raise LiteDetrError(f"{url} is no URL that can be opened. Give a host and one of the schemes {known}.")
    name = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    suffix = Path(parts.path).suffix.lower()
    if suffix in video.SUFFIXES or not parts.scheme.lower().startswith("http"):
        return Source(name, "video", lambda: read_video(url, name, True))
    kind = "image" if suffix in images.SUFFIXES - {".gif"} else None
    return Source(name, kind, lambda: _read_url(url, name))


def _read_url(url: str, name: str) -> Iterator[Frame]:
    """Yield the frames of what a web server has: an image, by its type or its suffix, or else a video."""
    parts = urllib.parse.urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    credentials = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
    headers = {"User-Agent": "litedetr-deploy"} | ({"Authorization": f"Basic {credentials}"} if at else {})
    try:
        request = urllib.request.Request(name, headers=headers)
        with urllib.request.urlopen(request, timeout=video.TIMEOUT) as answer:
            kind, suffix = answer.headers.get_content_type(), Path(parts.path).suffix.lower()
            is_image = kind.startswith("image/") or (suffix in images.SUFFIXES and "multipart" not in kind)
            content = answer.read(LARGEST_DOWNLOAD + 1) if is_image else b""
    except (OSError, ValueError, http.client.HTTPException) as error:
        fix = "Check the address, that the server is up, and that it can be reached from here."
        raise LiteDetrError(f"{name} cannot be opened: {getattr(error, 'reason', None) or error}. {fix}") from error
    if len(content) > LARGEST_DOWNLOAD:
        limit = f"more than {LARGEST_DOWNLOAD >> 20} MiB"
        raise LiteDetrError(f"The image {name} has {limit}. Download it, and give the file.")
    yield from read_frames(content, name) if is_image else read_video(url, name, True)


def _read_stdin() -> Iterator[Frame]:
    stream, name = sys.stdin.buffer, "standard input"
    head = stream.read(64)
    if not head:
        raise LiteDetrError("Standard input is empty. Pipe an image or a video into the command.")
    if _starts_image(head):
        yield from read_frames(head + stream.read(), name)
    else:
        yield from read_video(_Joined(head, stream), name)


def _starts_image(head: bytes) -> bool:
    starts = b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P2", b"P3", b"P5", b"P6"
    return head.startswith(starts) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


class _Joined:
    """A binary file whose first bytes have been read already."""

    def __init__(self, head: bytes, rest):
        self._head, self._rest = head, rest

    def read(self, size: int) -> bytes:
        if self._head:
            taken, self._head = self._head[:size], self._head[size:]
            return taken
        return self._rest.read(size)
