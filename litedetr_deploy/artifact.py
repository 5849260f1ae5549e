"""What a file of ours is: its metadata, suffixes and digest, how it is opened, what is said when it is damaged or no
longer what was verified, and the store that an interrupted run resumes from.  Imports nothing heavy."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import LiteDetrError, Notice, not_installed
from .files import replaced_when_done

if TYPE_CHECKING:
    import onnx

METADATA_KEY = "litedetr"  # of metadata_props in ONNX and of the header in safetensors; the value is one JSON object
ENGINE_SUFFIXES = (".plan", ".engine")
SUFFIXES = (".onnx", *ENGINE_SUFFIXES)
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".safetensors")

# What a verdict can be.  Whatever is not VERIFIED runs with a warning.
VERIFIED, FAILED, CANNOT_TELL, NOT_VERIFIED = "verified", "failed", "cannot tell", "not verified"

_DIGEST_FIELD = re.compile(rb'\\?"digest\\?": \\?"([0-9a-f]{64})\\?"')
NO_DIGEST = "0" * 64  # the `digest` of metadata that `seal` completes


def check_file(path: str | os.PathLike, wanted: str) -> None:
    """Raise LiteDetrError unless `path` is a file that can be read; `wanted` says what it should be."""
    if not Path(path).is_file():
        state = "is a directory" if Path(path).is_dir() else "does not exist"
        raise LiteDetrError(f"{path} {state}. Give the path of {wanted}.")
    if not os.access(path, os.R_OK):
        raise LiteDetrError(f"{path} cannot be read: permission denied. Change its permissions or copy it.")


def sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with _mapped(path) as contents:
        return hashlib.sha256(contents).hexdigest()


def damaged(path: str | os.PathLike, why: object) -> LiteDetrError:
    """Return the error for a file that is no ONNX model or a damaged one."""
    advice = "Check that it was copied completely, or export it again."
    return LiteDetrError(f"{path} is not an ONNX model, or a damaged one: {why}. {advice}")


def load_onnx(path: str | os.PathLike, weights: bool = True) -> onnx.ModelProto:
    """Return the ONNX model in the file `path`; without `weights`, external data is not read."""
    check_file(path, "an ONNX model, for instance one that `litedetr export` made")
    try:
        import onnx
    except ImportError as error:
        raise (not_installed(error, "Reading an ONNX graph") or error) from error
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own error classes differ between its implementations
        raise damaged(path, error) from error
    if not model.graph.node:
        raise damaged(path, "its graph is empty")
    if weights:
        check_external_data(path, model)
        onnx.external_data_helper.load_external_data_for_model(model, os.fspath(Path(path).parent))
    return model


def check_external_data(path: str | os.PathLike, model: onnx.ModelProto) -> None:
    """Raise LiteDetrError where weights that `model`, read from `path`, keeps in other files cannot be read."""
    folder = Path(path).resolve().parent
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if "location" not in entries:
            continue
        file = (folder / entries["location"]).resolve()
        if not file.is_relative_to(folder):
            raise LiteDetrError(
                f"{path} keeps the weight {tensor.name!r} in {entries['location']!r}, outside its own folder, which is "
                "not read. Save the model as one file, or with its weights beside it."
            )
        if not file.is_file():
            beside = f"{entries['location']!r}, which is not beside it. Copy that file there too."
            raise LiteDetrError(f"{path} keeps its weights in {beside}")
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        if file.stat().st_size < end:
            raise LiteDetrError(
                f"{file}, the weights of {path}, has {file.stat().st_size:,} bytes, and {tensor.name!r} ends at byte "
                f"{end:,}: it is cut short. Copy it again."
            )


def opset_version(model: str | os.PathLike | bytes, domain: str) -> int | None:
    """Return the version of the opset `domain` that an ONNX model, a path or bytes, imports; None where it does not.

    Needs no onnx: OperatorSetIdProto is found as it is serialized, 1: domain, 2: version as a varint.
    """
    mark = b"\x0a" + bytes([len(domain)]) + domain.encode() + b"\x10"
    with contextlib.nullcontext(model) if isinstance(model, bytes) else _mapped(model) as contents:
        place = contents.rfind(mark)  # it stands behind the graph
        number = contents[place + len(mark) : place + len(mark) + 10] if place >= 0 else b""
    version = 0
    for shift, byte in enumerate(number):
        version |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return version
    return None


@contextlib.contextmanager
def _mapped(path: str | os.PathLike, writable: bool = False) -> Iterator[Any]:
    """Give the bytes of a file, which need not fit into memory; those of a `writable` file can be set."""
    with open(path, "r+b" if writable else "rb") as file:
        if os.path.getsize(path):
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ) as contents:
                yield contents
        else:  # which cannot be mapped
            yield b""


def json_object(text: str) -> dict | None:
    """Return the JSON object in a text that anybody may have written; None where it is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def parse_metadata(text: str, path: object) -> dict:
    """Return the metadata of the file `path` from its text."""
    if (metadata := json_object(text)) is not None:
        return metadata
    raise LiteDetrError(
        f"the metadata entry {METADATA_KEY!r} of {path} is not a JSON object: {text[:80]!r}. Something rewrote it "
        "after the export: export the model again."
    )


def onnx_metadata(model: onnx.ModelProto, path: object) -> dict:
    """Return what `litedetr export` wrote into a model; raise LiteDetrError for one that something else made."""
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            return parse_metadata(entry.value, path)
    raise LiteDetrError(
        f"{path} was not made by `litedetr export` (it has no metadata {METADATA_KEY!r}). Export the model with it; "
        "trtexec builds other models."
    )


def seal(path: str | os.PathLike) -> None:
    """Write into the metadata of an ONNX file, whose `digest` is NO_DIGEST so far, the digest of all other bytes."""
    with _mapped(path, writable=True) as contents:
        place, digest = _digest(contents)
        if place is None:
            raise ValueError(f"{path} has no digest in its metadata")
        contents[place] = digest


def is_sealed(path: str | os.PathLike) -> bool:
    """Return whether an ONNX file still has the bytes that `seal` saw."""
    with _mapped(path) as contents:
        place, digest = _digest(contents)
        return place is not None and contents[place] == digest


def _digest(contents: mmap.mmap | bytes) -> tuple[slice | None, bytes]:
    """Return where an ONNX file says its digest, None for nowhere, and what it should be."""
    places = [slice(*match.span(1)) for match in _DIGEST_FIELD.finditer(contents)]
    if not places:
        return None, b""
    with memoryview(contents) as view:
        digest = hashlib.sha256(view[: places[-1].start])
        digest.update(NO_DIGEST.encode())
        digest.update(view[places[-1].stop :])
    return places[-1], digest.hexdigest().encode()


def distrust(path: str | os.PathLike, metadata: dict) -> str:
    """Return why what `path` computes is not proven, as half a sentence; empty for a verified file that is intact."""
    if not metadata:
        return "was not made by this package, and nothing was verified"
    verification = metadata.get("verification")
    verdict, why = map(verification.get, ("verdict", "why")) if isinstance(verification, dict) else (None, None)
    if verdict != VERIFIED:
        cannot_tell = "was not verified: the comparison cannot tell right from wrong"
        texts = {FAILED: "failed its verification", CANNOT_TELL: cannot_tell}
        return texts.get(str(verdict), "was not verified") + (f" ({why})" if why else "")
    if Path(path).suffix.lower() == ".onnx" and not is_sealed(path):
        return "was rewritten after it was verified"
    return ""


def warn_unless_verified(path: str | os.PathLike, metadata: dict) -> None:
    """Give a `Notice` where what `path` computes is not proven; see `distrust`."""
    if why := distrust(path, metadata):
        warnings.warn(f"{os.fspath(path)} {why}: its results are not proven", Notice, 3)


def cache_folder() -> Path:
    """Return the folder of this package in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litedetr-deploy"


class Store:
    """What is done of a long run, as lines of JSON in the file `path`, so that it resumes after an interruption.

    identity: JSON types that tell this run from others; what the file holds of another run is dropped.
    """

    def __init__(self, path: Path | None, identity: object):
        self.path, self._identity = path, json.loads(json.dumps(identity))
        self.items: dict[str, dict] = {}
        if path is not None:
            self._read()
        self.resumed = len(self.items)
        self._started = False

    def _read(self) -> None:
        with self._used():
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        # It may be damaged, or cut short by a killed process.
        with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
            if json.loads(lines[0])["identity"] == self._identity:
                for item in (json.loads(line) for line in lines[1:] if line.endswith(b"\n")):
                    self.items[item["key"]] = item["value"]

    def add(self, key: str, value: dict) -> None:
        """Keep `value`, JSON types, under `key`."""
        self.items[key] = value
        if self.path is None:
            return
        with self._used():
            if self._started:
                with self.path.open("a") as file:
                    file.write(_line(key=key, value=value))
            else:  # anew, so that what follows stands behind whole lines
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with replaced_when_done(self.path) as temporary:
                    lines = (_line(key=key, value=value) for key, value in self.items.items())
                    temporary.write_text(_line(identity=self._identity) + "".join(lines))
                self._started = True

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LiteDetrError(
                f"{self.path}, where this run keeps what is done, cannot be used: {error.strerror}. Choose another "
                "output, or set XDG_CACHE_HOME to a folder that can be written."
            ) from error


def _line(**fields) -> str:
    return json.dumps(fields) + "\n"
