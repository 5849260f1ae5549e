"""COCO AP and latency of any artifact, and two artifacts side by side."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from .. import __version__
from ..artifact import SUFFIXES, Store, cache_folder, sha256, warn_unless_verified
from ..errors import LiteDetrError, not_installed
from ..runtime.detector import Detections, Detector
from ..runtime.session import open_session
from .average_precision import average_precision, import_pycocotools
from .data import Dataset, open_data
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
        return {name: value for name, value in vars(self).items() if name != "detections"}


@dataclass
class Comparison:
    first: Evaluation
    second: Evaluation
    ap_difference: float  # of the second from the first
    detections: dict  # see compare_detections
    tolerance: float | None = None  # of the AP difference (0..1); None lets any pass

    @property
    def passed(self) -> bool:
        return self.tolerance is None or abs(self.ap_difference) <= self.tolerance

    def to_dict(self) -> dict:
        comparison = {"ap_difference": self.ap_difference, "detections": self.detections}
        if self.tolerance is not None:
            comparison |= {"tolerance": self.tolerance, "passed": self.passed}
        return {**self.first.to_dict(), "against": self.second.to_dict(), "comparison": comparison}


@dataclass(frozen=True)
class Options:
    """How artifacts are run; None: as fits the artifact and the data."""

    variant: str | None = None  # of a checkpoint, as `load_model` takes it
    force_variant: bool = False
    image_size: tuple[int, int] | None = None  # (height, width), for a model of dynamic size; else the data set's
    resize: str | None = None  # as `Detector.predict` takes it
    batch_size: int = 1  # images a run at most
    providers: Sequence[str] | None = None  # of ONNX Runtime, for an ONNX model
    threads: int | None = None  # of the CPU
    runtime: str | None = None  # of an ONNX model, as `open_session` takes it
    precision: str | None = None  # of OpenVINO, as `open_session` takes it


def _silent(stage: str, done: int, total: int | None) -> None:
    pass


def evaluate(
    artifact, data: Dataset | str | os.PathLike, options: Options | None = None, progress=_silent, elsewhere=None,
    **single,
) -> Evaluation:  # fmt: skip
    """Run `artifact` on every image of `data` and return its AP and latency.

    Detections are kept in the user's cache while it runs, so that an interrupted evaluation continues.

    Args:
        artifact: path of an ONNX model or of an engine; path of a checkpoint, or the name of one that comes with this
            package, to be run in PyTorch; or a session, which has what `OnnxSession` has.
        data: a `Dataset`, the path of a COCO folder, or 'shapes'.
        progress: called as progress(stage, done, total) when a stage begins and after every image of it; total is None
            for a stage that does not count images.
        elsewhere: what runs the images where this process does not; called as elsewhere(artifact, options, categories,
            load, entries), it yields each of the data's entries and what `detect` yields for it, in any order.
        single: fields of `options`, as in batch_size=2.

    Raises LiteDetrError where the model cannot be run, lacks a category of the data, or gives a NaN; a file that was
    not verified, or was changed since, gives a `Notice`.
    """
    [evaluation] = _evaluate([artifact], open_data(data), replace(options or Options(), **single), progress, elsewhere)
    return evaluation


def compare(
    artifact, other, data, options: Options | None = None, tolerance: float | None = None, progress=_silent,
    elsewhere=None, **single,
) -> Comparison:  # fmt: skip
    """Evaluate two artifacts as `evaluate` does and compare their detections.

    Where one has a fixed input size, the other takes the same if its own is dynamic; where one takes no pixel mask,
    images of a fixed size are stretched for both, unless `resize` says otherwise.
    """
    options = replace(options or Options(), **single)
    first, second = _evaluate([artifact, other], open_data(data), options, progress, elsewhere)
    found = compare_detections(first.detections, second.detections)
    return Comparison(first, second, second.metrics["AP"] - first.metrics["AP"], found, tolerance)


def open_detector(artifact, options: Options) -> Detector:
    """Return the detector of an artifact, which takes images of `options.image_size` where it could take any."""
    name, session = _name(artifact), _open(artifact, options)
    return Detector(_Measured(name, session, _fixed_size(session) or options.image_size))


def detect(detector: Detector, images, categories: dict[int, int], options: Options) -> Iterator[dict]:
    """Yield for each image what a detector of `open_detector` finds, in JSON types: seconds of its run, labels, boxes
    and scores; and `finite`, whether the outputs of its run were.  categories: label -> category id of the data."""
    for found in detector.stream(images, batch_size=options.batch_size, resize=options.resize, clip=False):
        known = np.isin(found.labels, list(categories))
        labels = [categories[label] for label in found.labels[known].tolist()]
        boxes, scores = found.boxes[known].tolist(), found.scores[known].tolist()
        yield {
            "seconds": detector.session.seconds, "labels": labels, "boxes": boxes, "scores": scores,
            "finite": detector.session.finite,
        }  # fmt: skip


def _evaluate(artifacts, dataset, options: Options, progress, elsewhere):
    import_pycocotools()  # before the work, not after it
    image_size, resize = options.image_size, options.resize
    names, sessions = list(map(_name, artifacts)), []
    for name, artifact in zip(names, artifacts):
        progress(f"load {name}", 0, None)
        sessions.append(_open(artifact, options))
    fixed = list(map(_fixed_size, sessions))
    for name, size in zip(names, fixed):
        if size and image_size and size != tuple(image_size):
            raise LiteDetrError(
                f"The input of {name} is fixed at {size[0]}x{size[1]} (height x width), and {image_size[0]}x"
                f"{image_size[1]} was asked for. Leave the size out, or export the model for it."
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
    options = replace(options, image_size=image_size, resize=resize)
    stores = [_store(artifact, dataset, asdict(options)) for artifact in artifacts]
    evaluations = []
    for artifact, name, detector, mode, categories, store in zip(artifacts, names, detectors, modes, labels, stores):

        def here(_artifact, options, categories, load, entries, detector=detector):
            return zip(entries, detect(detector, map(load, entries), categories, options))

        run = functools.partial(elsewhere or here, artifact, replace(options, resize=mode), categories, dataset.load)
        _run(name, run, dataset, store, options.batch_size, progress)
        progress(f"compute AP of {name}", 0, None)
        evaluations.append(_summary(name, detector, dataset, store, mode, options.batch_size))
    for store in stores:  # only now: an interruption of the second leaves the first done
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


def _store(artifact, dataset, settings) -> Store:
    """What is done of an evaluation: image id, as text -> what was found.  Its file in the user's cache is named after
    the contents of the artifact and the data and after the settings: a change of any begins anew."""
    if not isinstance(artifact, (str, os.PathLike)):  # a session
        return Store(None, None)
    # Of weights that come with this package the name is enough, its version is known.
    contents = sha256(artifact) if Path(artifact).is_file() else os.fspath(artifact)
    identity = [__version__, contents, dataset.fingerprint, settings]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    return Store(cache_folder() / f"evaluate-{name}.jsonl", identity)


def _open(artifact, options: Options):
    if hasattr(artifact, "run"):
        return artifact
    if Path(artifact).suffix.lower() in SUFFIXES:
        session = open_session(artifact, options.providers, options.threads, options.runtime, options.precision)
        warn_unless_verified(artifact, session.metadata)
        return session
    try:
        from ..model.checkpoints import load_model
        from ..model.deployed import TorchSession
    except ImportError as error:
        what = f"{artifact} is no {', '.join(SUFFIXES)} file, so PyTorch runs it, which"
        raise (not_installed(error, what) or error) from error
    return TorchSession(load_model(os.fspath(artifact), options.variant, options.force_variant), options.threads)


def _name(artifact):
    return os.fspath(artifact) if isinstance(artifact, (str, os.PathLike)) else type(artifact).__name__


def _fixed_size(session):
    """Return (height, width) of the input, None where it is dynamic."""
    size = tuple(session.inputs.get("images", ())[2:])
    return size if len(size) == 2 and all(isinstance(side, int) for side in size) else None


def _categories(dataset, metadata, name):
    """Return the artifact's labels -> category ids of the data, of the categories that both have.  A label is a
    category id, unless the artifact's class names say that the data numbers its categories otherwise."""
    names = metadata.get("class_names")
    number = len(names) if names else metadata.get("num_classes")
    used = {annotation["category_id"] for annotation in dataset.annotations}
    if names and any(names[id : id + 1] != [dataset.categories[id]] for id in used):
        known = list(dataset.categories.items())
        labels = {label: id for id, category in known for label in range(number) if names[label] == category}
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


def _run(name, run, dataset, store, batch_size, progress):
    """Run the images that the store lacks, and add what is found."""
    todo = [entry for entry in dataset.images if str(entry["id"]) not in store.items]
    total, stage = len(dataset.images), f"evaluate {name}"
    if store.resumed:
        stage += f", continued: {store.resumed} of {total} images were done before"
    progress(stage, store.resumed, total)
    try:
        for entry, found in run(todo):
            if not found.pop("finite"):
                raise LiteDetrError(
                    f"{name} gives a NaN or an infinity for the image {entry['file_name']}"
                    f"{' or another one of its batch' if batch_size > 1 else ''}. Find out with "
                    "`litedetr verify` what it computes otherwise than its checkpoint does."
                )
            store.add(str(entry["id"]), found)
            progress(stage, len(store.items), total)
    except KeyboardInterrupt:
        where = f" and kept in {store.path}: the same command continues" if store.path else ""
        raise KeyboardInterrupt(f"{len(store.items)} of {total} images are done{where}") from None


def _summary(name, detector, dataset, store, mode, batch_size):
    detections = {}
    for entry in dataset.images:
        found = store.items[str(entry["id"])]
        boxes, scores = np.array(found["boxes"], np.float32).reshape(-1, 4), np.array(found["scores"], np.float32)
        detections[entry["id"]] = Detections(np.array(found["labels"], np.int64), boxes, scores)
    seconds = np.array([found["seconds"] for found in store.items.values()])
    median, p90 = np.percentile(seconds, (50, 90)) * 1000
    return Evaluation(
        artifact=name, data=dataset.name, images=len(detections), objects=len(dataset.annotations),
        image_size=list(detector.image_size) if detector.image_size else None, resize=mode, batch_size=batch_size,
        metrics=average_precision(dataset, detections), latency_ms={"median": float(median), "p90": float(p90)},
        images_per_second=len(detections) / float(seconds.sum()), continued=store.resumed, detections=detections,
    )  # fmt: skip
