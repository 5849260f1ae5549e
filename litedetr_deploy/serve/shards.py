"""The folder of a job's results, in shards, on any file system.

A shard is there when all its images are done, so that a job which is started again continues after what is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .. import __version__
from ..artifact import json_object, sha256
from ..errors import LiteDetrError
from ..runtime.postprocess import MAX_DETECTIONS
from .storage import Source, explained, resolve

FORMATS = {"parquet": ".parquet", "coco": ".json"}
MANIFEST, FAILED = "manifest.json", "failed.jsonl"
SHARD_SIZE = 256  # images


@dataclass(frozen=True)
class Options:
    """What is detected, and how; the first six say what the shards hold."""

    threshold: float = 0.3
    resize: str | None = None  # as `Detector.predict` takes it
    runtime: str | None = None  # of an ONNX model, as `open_session` takes it
    precision: str | None = None  # of OpenVINO, as `open_session` takes it
    format: str = "parquet"  # of FORMATS
    shard_size: int = SHARD_SIZE  # images
    batch_size: int = 1  # images a run at most
    device: str | None = None  # of an ONNX model, as `open_session` takes it
    threads: int | None = None  # of the CPU, for each worker; one when not given


class Shards:
    """The shards of a job, on any file system; `failed` has a record of each image that failed, of the shards there."""

    def __init__(self, output: str, options: Options, model: Path, images: Sequence[Source]):
        from pyarrow import fs

        self.output, self.options, self.images = output, options, images
        self.filesystem, self.path, _ = resolve(output)
        listing = hashlib.sha256()
        for image in images:
            listing.update(json.dumps([image.name, *image.state]).encode())
        self.identity = {
            "version": __version__, "model": sha256(model), "images": listing.hexdigest(),
            "threshold": options.threshold, "resize": options.resize, "runtime": options.runtime,
            "precision": options.precision, "format": options.format, "shard_size": options.shard_size,
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:12]
        self.shards = [
            range(first, min(first + options.shard_size, len(images)))
            for first in range(0, len(images), options.shard_size)
        ]
        self.names = [
            f"{digest}-{number:05}-of-{len(self.shards):05}{FORMATS[options.format]}"
            for number in range(len(self.shards))
        ]
        with explained(output):
            if self.filesystem.get_file_info(self.path).type == fs.FileType.File:
                raise LiteDetrError(f"The output {output} is a file, and the shards need a folder. Choose another.")
            self._check_manifest()
            there = self._there()
            self.failed = [record for record in self._read_failed() if record["shard"] in there]

    def todo(self) -> list[int]:
        """Return the numbers of the images whose shards are not there."""
        with explained(self.output):
            there = self._there()
        return [image for name, shard in zip(self.names, self.shards) if name not in there for image in shard]

    def _there(self) -> set[str]:
        from pyarrow import fs

        selector = fs.FileSelector(self.path, allow_not_found=True)
        return {PurePosixPath(info.path).name for info in self.filesystem.get_file_info(selector)}

    def add(self, number: int, records: dict[int, dict], class_names: list[str] | None) -> None:
        """Write a shard: image number -> what was found on it."""
        failed = [image for image, record in sorted(records.items()) if "error" in record]
        self.failed += [
            {"image": self.images[image].name, "error": records[image]["error"], "shard": self.names[number]}
            for image in failed
        ]
        if failed:  # before the shard, whose presence says that all of this is known
            self.write_failed()
        found = [
            {"id": image + 1, "image": self.images[image].name, **records[image]}
            for image in self.shards[number]
            if image not in failed
        ]
        write = _parquet if self.options.format == "parquet" else _coco
        self._write(self.names[number], write(found, class_names))

    def write_failed(self) -> None:
        records = sorted(self.failed, key=lambda record: (record["shard"], record["image"]))
        if records or self._read(FAILED):
            self._write(FAILED, "".join(json.dumps(record) + "\n" for record in records).encode())

    def _read_failed(self) -> list[dict]:
        return [json.loads(line) for line in self._read(FAILED).splitlines()]

    def _check_manifest(self) -> None:
        text = self._read(MANIFEST)
        if not text:
            return
        before = (json_object(text.decode("utf-8", "replace")) or {}).get("made_from")
        if not isinstance(before, dict):
            raise LiteDetrError(f"{self.output}/{MANIFEST} is none of a job's. Choose another output folder.")
        differ = [
            f"{name} was {_short(before.get(name))} and is {_short(value)}"
            for name, value in self.identity.items()
            if before.get(name) != value
        ]
        if differ:
            raise LiteDetrError(
                f"{self.output} holds the shards of another job: {'; '.join(differ)}. Give the same command to "
                "continue that one, or choose another output folder."
            )

    def begin(self) -> None:
        """Make the folder and say in it what its shards are made from."""
        with explained(self.output):
            self.filesystem.create_dir(self.path, recursive=True)
        shards = [
            {
                "file": name,
                "images": len(shard),
                "first": self.images[shard[0]].name,
                "last": self.images[shard[-1]].name,
            }
            for name, shard in zip(self.names, self.shards)
        ]
        manifest = {"made_from": self.identity, "images": len(self.images), "shards": shards}
        self._write(MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())

    def _read(self, name: str) -> bytes:
        from pyarrow import fs

        path = f"{self.path}/{name}"
        if self.filesystem.get_file_info(path).type != fs.FileType.File:
            return b""
        with self.filesystem.open_input_stream(path) as file:
            return file.read()

    def _write(self, name: str, contents: bytes) -> None:
        """Write a file that appears complete or not at all; what a killed process has left is overwritten."""
        temporary = f"{self.path}/.{name}.unfinished"
        with explained(f"{self.output}/{name}"):
            try:
                with self.filesystem.open_output_stream(temporary) as file:
                    file.write(contents)
                self.filesystem.move(temporary, f"{self.path}/{name}")
            except BaseException:
                with contextlib.suppress(OSError):
                    self.filesystem.delete_file(temporary)
                raise


def _short(value: object) -> str:
    """Return a value for a sentence; of a digest the first digits are enough to tell it from another."""
    return repr(value[:12] + "...") if isinstance(value, str) and len(value) == 64 else repr(value)


def _parquet(found: list[dict], class_names: list[str] | None) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        "image": pa.string(), "width": pa.int32(), "height": pa.int32(), "labels": pa.list_(pa.int64()),
        "names": pa.list_(pa.string()), "scores": pa.list_(pa.float32()),
        "boxes": pa.list_(pa.list_(pa.float32(), 4)),
    }  # fmt: skip
    table = pa.Table.from_pylist([{name: one[name] for name in columns} for one in found], pa.schema(columns.items()))
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()


def _coco(found: list[dict], class_names: list[str] | None) -> bytes:
    images, annotations = [], []
    for one in found:
        images.append(
            {"id": one["id"], "file_name": one["image"], "width": one["width"], "height": one["height"]}
        )  # fmt: skip
        for number, (label, score, (x1, y1, x2, y2)) in enumerate(zip(one["labels"], one["scores"], one["boxes"]), 1):
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append({
                # Unique in the whole job, so that shards can be joined.
                "id": one["id"] * (MAX_DETECTIONS + 1) + number, "image_id": one["id"], "category_id": label,
                "bbox": box, "area": box[2] * box[3], "iscrowd": 0, "score": score,
            })  # fmt: skip
    if class_names is None:
        labels = sorted({annotation["category_id"] for annotation in annotations})
        categories = [{"id": label, "name": f"class {label}"} for label in labels]
    else:
        categories = [{"id": label, "name": name} for label, name in enumerate(class_names)]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories}).encode()
