"""COCO AP and latency of any artifact, and two artifacts side by side."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from .. import __version__
from ..artifact import ENGINE_SUFFIXES
from ..errors import LiteDetrError
from ..runtime.detector import Detections, Detector
from ..runtime.session import open_session
from .average_precision import average_precision, import_pycocotools
from .data import Dataset
from .match import compare_detections


@dataclass
class Evaluation:
    """What an artifact reaches on a data set."""

    artifact: str
    data: str
    images: int
    objects: int
    image_size: list[int] | None  # (height, width) of the model's input; None: another one for every aspect ratio
    resize: str
    batch_size: int
    metrics: dict[str, float | None]  # see average_precision
    latency_ms: dict[str, float]  # of the session's run, an image: median and p90
    images_per_second: float  # of the session's runs: loading, resizing and AP do not count
    continued: int  # images that an interrupted evaluation had done before
    detections: dict[int, Detections]  # image id -> all that the artifact found; labels are category ids of the data

    def to_dict(self) -> dict:
        """Return everything but the detections."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "detections"}


@dataclass
class Comparison:
    """Two artifacts on one data set."""

    first: Evaluation
    second: Evaluation
    ap_difference: float  # of the second from the first
    detections: dict  # see compare_detections

    def to_dict(self) -> dict:
        return {
            **self.first.to_dict(),
            "against": self.second.to_dict(),
            "comparison": {"ap_difference": self.ap_difference, "detections": self.detections},
        }


def evaluate(artifact, dataset: Dataset, **options) -> Evaluation:
    """Run `artifact` on every image of `dataset` and return its AP and latency.

    artifact: path of an ONNX model or of an engine; path of a checkpoint, or the name of one that comes with this
        package, to be run in PyTorch; or a session, which has what `OnnxSession` has.
    options: variant: as `load_model` takes it, for a checkpoint.
        image_size: (height, width) of the input, for a model of dynamic size; by default the data set's, if it has one.
        resize: as `Detector.predict` takes it.  By default what fits the model.
        batch_size: images a run at most.
        providers: of ONNX Runtime, for an ONNX model; threads: CPU threads.
        progress: called as progress(stage, done, total) when a stage begins and after every image of it; total is
        None for a stage that does not count images.

    Detections are kept in the user's cache while the evaluation runs; the same one continues after an interruption.
    Raises LiteDetrError where the model cannot be run, lacks a category of the data, or gives a NaN.
    """
    [evaluation] = _evaluate([artifact], dataset, **options)
    return evaluation


def compare(artifact, other, dataset: Dataset, **options) -> Comparison:
    """Evaluate two artifacts as `evaluate` does and compare their detections.

    Where one has a fixed input size, the other takes the same if its own is dynamic; where one takes no pixel mask,
    images of a fixed size are stretched for both, unless `resize` says otherwise.
    """
    first, second = _evaluate([artifact, other], dataset, **options)
    return Comparison(
        first,
        second,
        second.metrics["AP"] - first.metrics["AP"],
        compare_detections(first.detections, second.detections),
    )


def _evaluate(
    artifacts,
    dataset,
    variant=None,
    image_size=None,
    resize=None,
    batch_size=1,
    providers=None,
    threads=None,
    progress: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
):
    import_pycocotools()  # before the work, not after it
    sessions = []
    for artifact in artifacts:
        progress(f"load {_name(artifact)}", 0, None)
        sessions.append(_open(artifact, variant, providers, threads))
    names, fixed = list(map(_name, artifacts)), list(map(_fixed_size, sessions))
    for name, size in zip(names, fixed):
        if size and image_size and size != tuple(image_size):
            raise LiteDetrError(
                f"The input of {name} is fixed at {size[0]}x{size[1]} (height x width), and "
                f"{image_size[0]}x{image_size[1]} was asked for. Leave the size out, or export the "
                "model for it."
            )
    if image_size is None and resize != "shortest_edge":
        image_size = next(filter(None, fixed), dataset.image_size)
    if resize is None and image_size and not all("pixel_mask" in session.inputs for session in sessions):
        resize = "stretch"
    detectors = [
        Detector(_Measured(name, session, size or image_size)) for name, session, size in zip(names, sessions, fixed)
    ]
    modes = [detector.resize_mode(resize) for detector in detectors]
    labels = [_categories(dataset, session.metadata, name) for session, name in zip(sessions, names)]
    settings = [variant, image_size, resize, batch_size, providers, threads]
    kept = [_Kept(artifact, dataset, settings) for artifact in artifacts]
    evaluations = []
    for name, detector, mode, categories, store in zip(names, detectors, modes, labels, kept):
        _run(name, detector, dataset, categories, store, mode, batch_size, progress)
        progress(f"compute AP of {name}", 0, None)
        evaluations.append(_summary(name, detector, dataset, store, mode, batch_size))
    for store in kept:  # only now: an interruption of the second leaves the first done
        store.remove()
    return evaluations


class _Measured:
    """A session that times its runs, watches for NaN, and takes images of one size where it could take any."""

    def __init__(self, name, session, image_size):
        self._name, self._session = name, session
        self.inputs, self.outputs, self.metadata = dict(session.inputs), session.outputs, session.metadata
        self.seconds, self.finite = 0.0, True  # of the last run: time an image, and whether its outputs were
        if image_size and "images" in self.inputs:
            self.inputs["images"] = (*self.inputs["images"][:2], *image_size)

    def __str__(self):
        return self._name

    def run(self, feed):
        began = time.perf_counter()
        output = self._session.run(feed)
        self.seconds = (time.perf_counter() - began) / len(feed["images"])
        self.finite = all(np.isfinite(value).all() for value in output.values())
        return output


class _Kept:
    """What is done of an evaluation, on disk as one line of JSON an image until all is done.

    The file is in the user's cache, named after the contents of the artifact and the data and after the settings, so
    that a change of any begins anew.  For a session that the caller made nothing is kept.
    """

    def __init__(self, artifact, dataset, settings):
        self.done = {}  # image id -> (seconds, Detections)
        self.path = self._file = None
        if isinstance(artifact, (str, os.PathLike)):
            key = json.dumps([__version__, _contents(artifact), dataset.fingerprint, *settings])
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litedetr-deploy"
            self.path = cache / f"evaluate-{hashlib.sha256(key.encode()).hexdigest()[:32]}.jsonl"
            try:
                cache.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "a+b")
            except OSError as error:
                raise LiteDetrError(
                    f"The cache folder {cache}, where an evaluation keeps what is done, cannot be "
                    f"written: {error.strerror}. Set XDG_CACHE_HOME to a folder that can."
                ) from error
            self._read()
        self.continued = len(self.done)

    def _read(self):
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):  # the last one of a process that was killed
                break
            row = json.loads(line)
            found = Detections(
                np.array(row["labels"], np.int64),
                np.array(row["boxes"], np.float32).reshape(-1, 4),
                np.array(row["scores"], np.float32),
            )
            self.done[row["image"]] = row["seconds"], found
            whole += len(line)
        self._file.truncate(whole)

    def add(self, image, seconds, found):
        self.done[image] = seconds, found
        if self._file:
            row = {
                "image": image,
                "seconds": seconds,
                "labels": found.labels.tolist(),
                "boxes": found.boxes.tolist(),
                "scores": found.scores.tolist(),
            }
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()

    def remove(self):
        if self._file:
            self._file.close()
            self.path.unlink(missing_ok=True)


def _open(artifact, variant, providers, threads):
    if hasattr(artifact, "run"):
        return artifact
    if Path(artifact).suffix.lower() in (".onnx", *ENGINE_SUFFIXES):
        return open_session(artifact, providers, threads)
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise LiteDetrError(
            f"{artifact} is no .onnx, .plan or .engine file, so PyTorch would run it, and PyTorch "
            f"cannot be imported ({error}). Install it with "
            "`pip install litedetr-deploy[export]`."
        ) from error
    from ..model.checkpoints.official import load_model
    from ..model.session import TorchSession

    return TorchSession(load_model(os.fspath(artifact), variant), threads)


def _name(artifact):
    return os.fspath(artifact) if isinstance(artifact, (str, os.PathLike)) else type(artifact).__name__


def _contents(artifact):
    """Return a hash of the artifact's file; of weights that come with this package the name, its version is known."""
    if not Path(artifact).is_file():
        return os.fspath(artifact)
    digest = hashlib.sha256()
    with open(artifact, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _fixed_size(session):
    """Return (height, width) of the input, None where it is dynamic."""
    size = tuple(session.inputs.get("images", ())[2:])
    return size if len(size) == 2 and all(isinstance(side, int) for side in size) else None


def _categories(dataset, metadata, name):
    """Return a dict of the artifact's labels -> category ids of the data, of the categories that both have.

    A label is a category id, unless the artifact's class names say that the data numbers its categories otherwise.
    Raises LiteDetrError for a category of an annotation that the artifact lacks.
    """
    names = metadata.get("class_names")
    number = len(names) if names else metadata.get("num_classes")
    used = {annotation["category_id"] for annotation in dataset.annotations}
    if names and any(names[id : id + 1] != [dataset.categories[id]] for id in used):
        labels = {
            label: id
            for id, category in dataset.categories.items()
            for label in range(len(names))
            if names[label] == category
        }
        why = f"its {number} classes are {', '.join(dict.fromkeys(names))}"
    else:
        labels = {id: id for id in dataset.categories if number is None or 0 <= id < number}
        why = f"its labels are 0 to {(number or 0) - 1}"
    lacking = sorted(used - set(labels.values()))
    if lacking:
        others = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise LiteDetrError(
            f"{name} does not know the category {lacking[0]}, {dataset.categories[lacking[0]]!r}, of "
            f"{dataset.name}{others}: {why}. Evaluate on data of its own categories."
        )
    return labels


def _run(name, detector, dataset, categories, store, mode, batch_size, progress):
    """Run the detector on the images that the store lacks, and add what it finds; labels become category ids."""
    todo = [entry for entry in dataset.images if entry["id"] not in store.done]
    total = len(dataset.images)
    stage = f"evaluate {name}"
    if store.continued:
        stage += f", continued: {store.continued} of {total} images were done before"
    progress(stage, store.continued, total)
    stream = detector.stream((dataset.load(entry) for entry in todo), batch_size=batch_size, resize=mode)
    try:
        for entry, found in zip(todo, stream):
            if not detector.session.finite:
                raise LiteDetrError(
                    f"{name} gives a NaN or an infinity for the image {entry['file_name']}"
                    f"{' or another one of its batch' if batch_size > 1 else ''}. Find out with "
                    "`litedetr verify` what it computes otherwise than its checkpoint does."
                )
            known = np.isin(found.labels, list(categories))
            labels = np.array([categories[label] for label in found.labels[known].tolist()], np.int64)
            store.add(
                entry["id"], detector.session.seconds, Detections(labels, found.boxes[known], found.scores[known])
            )
            progress(stage, len(store.done), total)
    except KeyboardInterrupt:
        where = f" and kept in {store.path}: the same command continues" if store.path else ""
        raise KeyboardInterrupt(f"{len(store.done)} of {total} images are done{where}") from None


def _summary(name, detector, dataset, store, mode, batch_size):
    seconds = np.array([seconds for seconds, _ in store.done.values()])
    detections = {image: found for image, (_, found) in store.done.items()}
    median, p90 = np.percentile(seconds, (50, 90)) * 1000
    return Evaluation(
        artifact=name,
        data=dataset.name,
        images=len(detections),
        objects=len(dataset.annotations),
        image_size=list(detector.image_size) if detector.image_size else None,
        resize=mode,
        batch_size=batch_size,
        metrics=average_precision(dataset, detections),
        latency_ms={"median": float(median), "p90": float(p90)},
        images_per_second=len(detections) / float(seconds.sum()),
        continued=store.continued,
        detections=detections,
    )
