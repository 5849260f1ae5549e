"""Files and folders that appear complete or not at all.

What is unfinished has a hidden name that says which process writes it: what a killed one has left, the next removes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import LiteDetrError

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # noqa: F401

_HOST = re.sub(r"[^\w-]", "_", socket.gethostname())  # a folder can be another machine's as well
_UNFINISHED = re.compile(rf"\..*\.litedetr-{re.escape(_HOST)}-(\d+)-[^.]*")


def check_writable(folder: str | os.PathLike) -> None:
    """Raise LiteDetrError unless `folder` is a folder that files can be made in."""
    folder = Path(folder)
    if not folder.is_dir():
        state = "is not a directory" if folder.exists() else "does not exist"
        raise LiteDetrError(f"The output directory {folder} {state}. Make it first, or choose another.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LiteDetrError(
            f"The output directory {folder} is not writable. Choose another, or change its permissions."
        )


@contextlib.contextmanager
def replaced_when_done(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary name in the folder of `path`; it becomes `path` when the block ends, and vanishes if it fails.

    An interruption (Ctrl-C) is a failure.
    """
    path = Path(path)
    with _writing(path) as prefix:
        handle, name = tempfile.mkstemp(prefix=prefix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes the file private; give it the permissions that open() would.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def folder_beside(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary folder beside `path`, on the same disk; it is removed when the block ends."""
    path = Path(path)
    with _writing(path) as prefix:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[str]:
    """Remove what ended processes have left beside `path`, and give the start of an unfinished name."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(path.parent)):
            found = _UNFINISHED.fullmatch(entry.name)
            if found and not _runs(int(found[1])):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)
    try:
        yield f".{path.name[:100]}.litedetr-{_HOST}-{os.getpid()}-"
    except OSError as error:
        raise LiteDetrError(
            f"{path} cannot be written: {error.strerror}. Choose a folder that exists and is yours to write."
        ) from error


def _runs(process: int) -> bool:
    if os.name != "posix":  # there os.kill() ends the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
