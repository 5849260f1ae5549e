"""Images on any file system that pyarrow knows: local paths, s3://, gs://, abfs://, hdfs://."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from PIL import Image

from ..errors import LiteDetrError
from ..runtime.images import SUFFIXES, read_frames

if TYPE_CHECKING:
    import pyarrow.fs


class Source(NamedTuple):
    """An image on a file system."""

    name: str  # absolute path, or URI
    filesystem: pyarrow.fs.FileSystem
    path: str  # in the file system
    state: tuple  # size in bytes and time of change, by which a changed image is noticed


def find_images(sources: Sequence[str | os.PathLike]) -> list[Source]:
    """Return the images that `sources` stand for, each once, sorted by name within a source.

    Raises LiteDetrError for a source that does not exist, a folder or pattern without images, and a file system that
    pyarrow does not know or cannot reach.
    """
    found: dict[str, Source] = {}
    for source in sources:
        for image in _listed(os.fspath(source)):
            found.setdefault(image.name, image)
    return list(found.values())


def _listed(source: str) -> list[Source]:
    from pyarrow import fs

    filesystem, path, prefix = resolve(source)
    # A name may hold what looks like a pattern, and is taken literally where it exists.
    with explained(source):
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.File:
            return [_source(prefix, filesystem, info)]
        parts = PurePosixPath(path).parts
        first = next((place for place, part in enumerate(parts) if any(c in part for c in "*?[")), None)
        if info.type == fs.FileType.NotFound and first is None:
            raise LiteDetrError(f"The image {source} does not exist. Check the path.")
        pattern = ["*"] if info.type == fs.FileType.Directory else list(parts[first:])
        folder = path if info.type == fs.FileType.Directory else str(PurePosixPath(*parts[:first]))
        selector = fs.FileSelector(folder, allow_not_found=True, recursive=len(pattern) > 1 or "**" in pattern)
        inside = filesystem.get_file_info(selector)
    depth = len(PurePosixPath(folder).parts)
    images = [
        _source(prefix, filesystem, info)
        for info in inside
        if info.type == fs.FileType.File
        and PurePosixPath(info.path).suffix.lower() in SUFFIXES
        and _matches(PurePosixPath(info.path).parts[depth:], pattern)
    ]
    if not images:
        what = "pattern" if info.type == fs.FileType.NotFound else "directory"
        fix = "Give one that does, or name the files."
        raise LiteDetrError(f"The {what} {source} holds no image ({', '.join(sorted(SUFFIXES))}). {fix}")
    return sorted(images, key=lambda image: image.name)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether the parts of a path fit those of a glob pattern; ** stands for any number of folders."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _source(prefix, filesystem, info) -> Source:
    return Source(prefix + info.path, filesystem, info.path, (info.size, info.mtime_ns))


def resolve(place: str) -> tuple[pyarrow.fs.FileSystem, str, str]:
    """Return the file system of a local path or URI, the path in it, and what stands before that in a name."""
    import pyarrow
    from pyarrow import fs

    if "://" not in place:
        return fs.LocalFileSystem(), os.path.abspath(place), ""
    with explained(place):
        try:
            # A URI has no spaces and brackets, names and patterns have; what follows ? are options of the file system.
            filesystem, path = fs.FileSystem.from_uri(quote(place, safe="/:?=&%@+,;~*!$'()"))
        except pyarrow.ArrowInvalid as error:
            known = "s3://, gs://, abfs://, hdfs:// and file://"
            raise LiteDetrError(f"{place} is no place that can be read: {error}. Give a path, or {known}.") from error
    scheme = place.partition("://")[0]
    return filesystem, path.rstrip("/"), "" if scheme == "file" else f"{scheme}://"


@contextlib.contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn what a file system raises into one paragraph; pyarrow's errors of remote systems are OSErrors."""
    try:
        yield
    except OSError as error:
        fix = "Check the address, the network and the permissions."
        raise LiteDetrError(f"{place} cannot be used: {error}. {fix}") from error


def open_image(source: Source) -> Image.Image:
    """Return an image as RGB; raise LiteDetrError for one that cannot be read."""
    try:
        with source.filesystem.open_input_file(source.path) as file:
            content = file.read()
    except MemoryError:
        raise
    except Exception as error:  # file systems raise what they like
        fix = "Check that it can be read from there, or leave it out."
        raise LiteDetrError(f"The image {source.name} cannot be read: {error}. {fix}") from error
    return next(read_frames(content, source.name)).image
