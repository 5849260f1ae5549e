"""Jobs on a Ray cluster: the detections of many images as shards on any file system, and those that `evaluate` scores.

Ray Data reads and decodes images in tasks and runs them in a pool of actors, one detector each.  The process that
started the job writes the shards: a shard is there when all its images are done, so that no retry of Ray's can lose an
image or write it twice.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pickle
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from PIL import Image

from ..artifact import ENGINE_SUFFIXES, check_file, distrust
from ..errors import LiteDetrError, Notice, not_installed, printable
from ..evaluate.evaluate import Options as EvaluationOptions
from ..evaluate.evaluate import detect, open_detector
from ..export.limits import check_choice
from ..runtime.detector import Detector
from .shards import FORMATS, Options, Shards
from .storage import find_images, open_image

MOST_BLOCKS = 4096  # of Ray Data; each costs its scheduler some milliseconds
TASK_RETRIES = 3  # of images whose process ended: those that end every process must not do so for ever
CONNECT_SECONDS = 5.0  # Ray itself takes five minutes to give up


@dataclass(frozen=True)
class Cluster:
    """Where a job runs."""

    # As `ray.init` takes it; None: RAY_ADDRESS, else a cluster that runs here, else a new one.
    address: str | None = None
    workers: int | None = None  # detectors; None: one a GPU, or as many as the CPUs are enough for


def _silent(stage: str, done: int, total: int | None) -> None:
    pass


def predict(
    model: str | os.PathLike, sources: Sequence[str | os.PathLike], output: str | os.PathLike,
    options: Options | None = None, cluster: Cluster | None = None, progress=_silent, **single,
) -> dict:  # fmt: skip
    """Detect objects on all images of `sources` and write them to the folder `output`, in shards.

    A shard has up to `shard_size` successive images; `manifest.json` lists the shards and says what they were made
    from, `failed.jsonl` lists the images that could not be read and why.  Shards that are there are not made again.

    Args:
        model: ONNX model or engine (.plan, .engine); it is sent to the workers.
        sources: images, folders and glob patterns, as local paths or as URIs of pyarrow's file systems (s3://, gs://,
            abfs://, hdfs://).  A cluster of several machines must see local paths at the same place on each.
        output: folder, local to this process or as a URI.
        progress: called as progress(stage, done, total) when a stage begins and after images are done.
        single: fields of `options`, as in batch_size=8.

    Returns a dict: model, output, format, images, done (now), continued (done before), failed, shards, seconds.

    Raises LiteDetrError for a source without images, an output that holds another job's shards, a cluster that cannot
    be reached or lacks the resources, and a model that cannot be loaded or run.
    """
    options, cluster = replace(options or Options(), **single), cluster or Cluster()
    _check(options, cluster)
    check_file(model, "the model")
    _import_ray()
    began = time.monotonic()
    progress("list the images", 0, None)
    images = find_images(sources)
    folder = Shards(os.fspath(output), options, Path(model), images)
    todo = folder.todo()
    if todo:
        with connected(cluster.address, progress):
            _fill(folder, todo, Path(model), options, cluster, progress)
    folder.write_failed()  # that of a run which ended before it may name images of shards that were made again
    return {
        "model": os.fspath(model), "output": os.fspath(output), "format": options.format, "images": len(images),
        "done": len(todo), "continued": len(images) - len(todo), "failed": len(folder.failed),
        "shards": len(folder.shards), "seconds": time.monotonic() - began,
    }  # fmt: skip


def evaluator(cluster: Cluster | None = None, progress=_silent) -> Callable:
    """Return what `evaluate` takes as `elsewhere`: it runs the images on the cluster."""
    cluster = cluster or Cluster()

    def run(artifact, options: EvaluationOptions, categories: dict, load: Callable, entries: list) -> Iterator:
        if not isinstance(artifact, (str, os.PathLike)):
            raise LiteDetrError("A session cannot be sent to a Ray cluster. Give the path of its model.")
        if not entries:
            return
        options = replace(options, threads=options.threads or 1)
        with connected(cluster.address, progress):
            providers = (one if isinstance(one, str) else one[0] for one in options.providers or ())
            on_gpu = any(provider != "CPUExecutionProvider" for provider in providers)
            needs = _needs(artifact, on_gpu, options.threads, cluster)
            worker = _Evaluator(_Shipped(artifact), options, categories)
            for index, found in _detections(entries, load, worker, options.batch_size, needs):
                if "error" in found:
                    raise LiteDetrError(found["error"])
                yield entries[index], found

    return run


def _check(options: Options, cluster: Cluster) -> None:
    check_choice("The format of the shards", options.format, tuple(FORMATS))
    for name, value in (
        ("batch_size", options.batch_size), ("shard_size", options.shard_size),
        ("workers", cluster.workers), ("threads", options.threads),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise LiteDetrError(f"{name} is {value}; it must be 1 or more.")


def _import_ray():
    try:
        import pyarrow  # noqa: F401
        import ray
        import ray.data
    except ImportError as error:
        raise (not_installed(error, "A job on a Ray cluster") or error) from error
    return ray


@contextlib.contextmanager
def connected(address: str | None = None, progress=_silent) -> Iterator[None]:
    """Connect to the cluster at `address`, as `Cluster` has it, and disconnect; a connection that is there is kept.

    Raises LiteDetrError for a cluster that is not there, within seconds.
    """
    ray = _import_ray()
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    progress(f"connect to the Ray cluster {address}" if address else "start Ray", 0, None)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that starts here tells nobody
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of how Ray Data itself starts actors
    fix = "Start it with `ray start --head`, give its address, or leave the address out to run on this machine."
    if address:
        _check_address(address, fix)
    try:
        ray.init(address, include_dashboard=False, logging_level="error", log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise LiteDetrError(f"The Ray cluster {address} cannot be used: {error}. {fix}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str, fix: str) -> None:
    """Raise LiteDetrError where nothing listens at an address that says host and port."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        return  # 'auto' and 'local', and what Ray refuses
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        raise LiteDetrError(f"There is no Ray cluster at {address}: {error}. {fix}") from error


class _Needs(NamedTuple):
    """What Ray schedules by."""

    workers: int
    cpus: int  # of a worker
    gpus: int


def _needs(artifact, on_gpu: bool, threads: int, cluster: Cluster) -> _Needs:
    """Return what the workers need; raise LiteDetrError where no machine of the cluster has that."""
    ray = _import_ray()
    on_gpu = on_gpu or Path(artifact).suffix.lower() in ENGINE_SUFFIXES
    kind, amount = ("GPU", 1) if on_gpu else ("CPU", threads)
    machines = [node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]]
    fit = sum(int(has // amount) for has in machines)
    if not fit:
        raise LiteDetrError(
            f"A worker needs {amount} {kind}{'s' * (amount > 1)}, and no machine of the Ray cluster has that many: "
            f"{', '.join(f'{has:g}' for has in machines)}. Start one that does, or ask for less."
        )
    return _Needs(cluster.workers or fit, threads, int(on_gpu))


class _Shipped:
    """A model's file, which travels to the workers; anything else, as the name of weights, stays what it is."""

    def __init__(self, artifact: str | os.PathLike):
        self._name, self._contents = os.fspath(artifact), None
        if Path(artifact).is_file():
            self._contents = _import_ray().put(Path(artifact).read_bytes())

    @contextlib.contextmanager
    def here(self) -> Iterator[str]:
        """Give the path of the file on this machine."""
        if self._contents is None:
            yield self._name
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(self._name).name
            path.write_bytes(_import_ray().get(self._contents))
            yield str(path)


class _Predictor:
    """How a worker of `predict` opens its detector, and what it says of an image."""

    def __init__(self, model: _Shipped, options: Options):
        self._model, self._options = model, options
        self._detector: Any = None

    def open(self) -> None:
        one = self._options
        with self._model.here() as path:
            self._detector = Detector(
                path, threads=one.threads or 1, runtime=one.runtime, precision=one.precision, device=one.device
            )
        self._detector.resize_mode(one.resize)

    def about(self) -> tuple[list[str] | None, str]:
        """Return the class names, and why what the model computes is not proven."""
        with self._model.here() as path:
            return self._detector.class_names, distrust(path, self._detector.session.metadata)

    def __call__(self, images: list[Image.Image]) -> Iterator[dict]:
        one = self._options
        for image, found in zip(images, self._detector.stream(images, one.threshold, one.batch_size, one.resize)):
            yield {
                "width": image.width, "height": image.height, "labels": found.labels.tolist(), "names": found.names,
                "scores": found.scores.tolist(), "boxes": found.boxes.tolist(),
            }  # fmt: skip


class _Evaluator:
    """How a worker of `evaluate` opens its detector, and what it says of an image."""

    def __init__(self, artifact: _Shipped, options: EvaluationOptions, categories: dict):
        self._artifact, self._options, self._categories = artifact, options, categories
        self._detector: Any = None

    def open(self) -> None:
        with self._artifact.here() as path:
            self._detector = open_detector(path, self._options)

    def __call__(self, images: list[Image.Image]) -> Iterator[dict]:
        return detect(self._detector, images, self._categories, self._options)


class _Actor:
    """A worker in the pool."""

    def __init__(self, worker: _Predictor | _Evaluator):
        worker.open()
        self._worker = worker

    def __call__(self, table):
        import pyarrow as pa

        images = [pickle.loads(image) for image in table["image"].to_pylist()]
        found = iter(self._worker([image for image in images if isinstance(image, Image.Image)]))
        records = [next(found) if isinstance(image, Image.Image) else {"error": image} for image in images]
        return pa.table({"index": table["index"], "found": pa.array(map(pickle.dumps, records), pa.large_binary())})


@functools.lru_cache(1)
def _fetched(reference):
    return _import_ray().get(reference)


def _load(table, reference):
    """Return a table of the items' images, or of what is wrong with them.  reference: of `load` of `_detections`."""
    import pyarrow as pa

    load = _fetched(reference)
    images: list = []
    for item in table["item"].to_pylist():
        try:
            images.append(load(pickle.loads(item)))
        except LiteDetrError as error:
            images.append(str(error))
    return pa.table({"index": table["index"], "image": pa.array(map(pickle.dumps, images), pa.large_binary())})


def _detections(
    items: Sequence, load: Callable, worker: _Predictor | _Evaluator, batch_size: int, needs: _Needs
) -> Iterator[tuple[int, dict]]:
    """Yield the index of an item, and what the workers say of its image or {'error': why}, in the order of completion.

    load: an item -> RGB image; raises LiteDetrError for one that cannot be read.
    """
    import pyarrow as pa

    ray = _import_ray()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # stderr is for our progress; its files keep everything
            handler.setLevel(logging.CRITICAL)
    # Blocks of whole batches, so that every run but the last of a block has `batch_size` images.
    size = batch_size * -(-len(items) // (batch_size * MOST_BLOCKS))
    blocks = []
    for first in range(0, len(items), size):
        indexes = range(first, min(first + size, len(items)))
        pickled = [pickle.dumps(items[index]) for index in indexes]
        blocks.append(pa.table({"index": pa.array(indexes, pa.int64()), "item": pa.array(pickled, pa.large_binary())}))
    workers = min(needs.workers, len(blocks))
    batches = {"batch_size": batch_size, "batch_format": "pyarrow"}
    with warnings.catch_warnings():
        # Ray 2.60 has no other way to limit the retries, which have no limit by default.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        images = ray.data.from_arrow(blocks).map_batches(
            _load,
            fn_args=(ray.put(load),),
            # Where the detectors take all CPUs, the tasks that read must not wait for one.
            num_cpus=1 if needs.gpus else 0,
            compute=ray.data.TaskPoolStrategy(None if needs.gpus else workers),
            max_retries=TASK_RETRIES,
            **batches,
        )
        found = images.map_batches(
            _Actor,
            fn_constructor_args=(worker,),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=0 if needs.gpus else needs.cpus,
            num_gpus=needs.gpus,
            max_restarts=-1,
            max_task_retries=TASK_RETRIES,
            **batches,
        )
    try:
        for table in found.iter_batches(batch_size=None, batch_format="pyarrow"):
            for index, record in zip(table["index"].to_pylist(), table["found"].to_pylist()):
                yield index, pickle.loads(record)
    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise LiteDetrError(
            f"Processes of the Ray cluster ended, {TASK_RETRIES + 1} times with the same images: "
            f"{printable(error)[:500]}. If the memory was not enough, take fewer workers (--workers) or a smaller "
            "batch; else see Ray's logs."
        ) from error


def _fill(folder: Shards, todo: list[int], model: Path, options: Options, cluster: Cluster, progress) -> None:
    """Run the images whose numbers are `todo` and write their shards."""
    ray, images = _import_ray(), folder.images
    needs = _needs(model, (options.device or "cpu") != "cpu", options.threads or 1, cluster)
    worker = _Predictor(_Shipped(model), options)
    progress("load the model", 0, None)
    class_names, why = _ask(ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus)(_about).remote(worker))
    if why:
        warnings.warn(f"{model} {why}: its results are not proven", Notice, 3)
    folder.begin()
    stage = f"predict with {needs.workers} worker{'s' * (needs.workers > 1)}"
    before = len(images) - len(todo)
    if before:
        stage += f", continued: {before} of {len(images)} images were done before"
    progress(stage, before, len(images))
    unwritten: dict[int, dict[int, dict]] = {}  # shard number -> image number -> what was found
    items = [images[number] for number in todo]
    try:
        for done, (index, record) in enumerate(
            _detections(items, open_image, worker, options.batch_size, needs), before + 1
        ):
            shard, image = todo[index] // options.shard_size, todo[index]
            unwritten.setdefault(shard, {})[image] = record
            if len(unwritten[shard]) == len(folder.shards[shard]):
                folder.add(shard, unwritten.pop(shard), class_names)
            progress(stage, done, len(images))
    except KeyboardInterrupt:
        done = len(images) - len(folder.todo())
        kept = f"{done} of {len(images)} images are done and in {folder.output}: the same command continues"
        raise KeyboardInterrupt(kept) from None


def _about(worker: _Predictor):
    worker.open()
    return worker.about()


def _ask(reference):
    """Return the result of a task; raise its LiteDetrError as it was raised there."""
    ray = _import_ray()
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LiteDetrError):
            raise error.cause from None
        raise
