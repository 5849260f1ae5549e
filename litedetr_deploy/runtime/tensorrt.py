"""TensorRT and TensorRT-RTX engines behind the session interface; needs their package and NVIDIA's CUDA bindings."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..artifact import check_file, sha256
from ..errors import LiteDetrError
from ..ops import native, schema
from . import cuda
from .session import check_metadata, check_op_version, find_failure

if TYPE_CHECKING:
    import tensorrt  # or tensorrt_rtx, which has the same classes

MODULES = ("tensorrt", "tensorrt-rtx")  # backends; each is an extra of this package, and with _ for - a Python module
CONTEXTS = 4  # input shapes that are kept ready at a time
MAGIC = re.compile(rb"[a-z]trt")  # what an engine begins with: ftrt, ptrt, vtrt


def import_tensorrt(backend: str):
    """Return the Python module of `backend`, one of MODULES; raise LiteDetrError where it cannot be imported."""
    module = backend.replace("-", "_")
    try:
        found = importlib.import_module(module)
        if not hasattr(found, "__version__"):  # Python imports any folder of that name
            raise ImportError(f"{next(iter(found.__path__))} is a folder of that name, and no package")
        return found
    except (ImportError, OSError) as error:
        fix = f"Install it with `pip install litedetr-deploy[{backend}]`; on a Jetson it comes with JetPack."
        raise LiteDetrError(f"{module} cannot be imported ({error}). {fix}") from error


def message_logger(trt):
    """Return a logger for `trt` that prints nothing; its `errors` are a list of what it was told."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors = []

        def log(self, severity, message):
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def load_plugins(registry: tensorrt.IPluginRegistry) -> Path:
    """Load this package's plugins into a TensorRT plugin registry and return their library.

    Raises LiteDetrError where it was not built or does not load.
    """
    try:
        library = native.library("tensorrt")
    except FileNotFoundError as error:
        raise LiteDetrError(str(error)) from error
    is_loaded = registry.get_creator(schema.KEY_AWARE, str(schema.VERSION), "") is not None
    if not is_loaded and registry.load_library(str(library)) is None:
        fix = "Build it on this machine: `pip install --force-reinstall .` in the source folder."
        raise LiteDetrError(f"TensorRT cannot load the plugin library {library}. {fix}")
    return library


def record_path(engine: str | os.PathLike) -> Path:
    """Return where the description of an engine lies: beside it, so that trtexec can load the engine itself."""
    return Path(f"{os.fspath(engine)}.json")


def read_record(engine: str | os.PathLike) -> dict:
    """Return what `litedetr build` wrote beside an engine; empty where there is nothing.

    Raises LiteDetrError where it cannot be read, where it describes another file, and for what is no engine at all.
    """
    path = record_path(engine)
    with open(engine, "rb") as file:
        beginning = file.read(4)
    if not beginning:
        raise LiteDetrError(f"{engine} is empty. Copy it again, or build it again with `litedetr build`.")
    if not path.exists() and not MAGIC.fullmatch(beginning):
        raise LiteDetrError(
            f"{engine} is not a TensorRT engine: it begins with {beginning!r}, and {path.name}, which `litedetr build` "
            "writes beside an engine, is not there. Copy both files again, or build the engine again."
        )
    try:
        record = json.loads(path.read_text())
        recorded = record["sha256"]
        record["metadata"] = dict(record.get("metadata") or {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LiteDetrError(
            f"{path}, which describes {engine}, cannot be read ({type(error).__name__}: {error}). Copy it again, build "
            "the engine again, or remove it if trtexec built the engine."
        ) from error
    found = sha256(engine)
    if found != recorded:
        raise LiteDetrError(
            f"{engine} is not the engine that {path.name} describes: its SHA-256 is {found[:12]}..., and "
            f"{recorded[:12]}... is recorded. It was damaged or replaced: copy both files again, or build the engine "
            "again."
        )
    return record


def deserialize(
    trt, runtime: tensorrt.Runtime, logger, path: str | os.PathLike, record: dict, gpu: cuda.Gpu
) -> tensorrt.ICudaEngine:
    """Return the engine in the file `path`; raise LiteDetrError that says why it cannot be loaded on `gpu`."""
    # Code for the host is in a version-compatible engine: TensorRT's lean runtime and the plugins.
    runtime.engine_host_code_allowed = bool(record.get("options", {}).get("version_compatible"))
    engine = runtime.deserialize_cuda_engine(Path(path).read_bytes())
    if engine is not None:
        return engine
    rows, why = find_failure("tensorrt", " ".join(logger.errors))
    built_with, built_on = record.get("version"), record.get("compute_capabilities")
    if why in (None, "not an engine") and built_with not in (None, trt.__version__):
        why = "version"
    elif why is None:
        why = "device" if built_on and gpu.compute_capability not in built_on else "not an engine"
    said = f"TensorRT says: {logger.errors[0].strip()[:300]}" if logger.errors else "TensorRT does not say why"
    message = rows[why]["message"].format(
        name=path, trt=trt, gpu=gpu, schema=schema, library=native.LIBRARIES["tensorrt"],
        built_with=built_with or "of another version", built_on=" and ".join(built_on or ["another one"]), said=said,
    )  # fmt: skip
    raise LiteDetrError(message)


class TensorRTSession:
    """An engine, ready to run: what `OnnxSession` is to an ONNX model.  Not for several threads at a time.

    artifact: path of an engine of `litedetr build`, or of one that trtexec built, which has no metadata
    inputs: name -> shape, a tuple with an int where the engine takes one size only and None where it takes several
    outputs: names, in the engine's order
    metadata: what `litedetr export` wrote into the ONNX model, with the verdict on the engine as its `verification`

    Raises LiteDetrError where TensorRT, the CUDA bindings or a GPU is missing, and for what cannot be loaded here.
    """

    def __init__(self, artifact):
        check_file(artifact, "a TensorRT engine, for instance one that `litedetr build` made")
        self.path = Path(artifact)
        record = read_record(artifact)
        self.metadata = record.get("metadata", {})
        check_op_version(artifact, self.metadata)
        backend = record.get("backend", "tensorrt")
        try:
            trt = import_tensorrt(backend)
        except LiteDetrError as error:
            if record:
                raise
            raise LiteDetrError(
                f"{artifact} has no {record_path(artifact).name} beside it, which says what it was built with. Copy "
                f"that file as well, if `litedetr build` made the engine; if trtexec did: {error}"
            ) from error
        gpu = cuda.find_gpu()
        self._logger = message_logger(trt)
        runtime: tensorrt.Runtime = trt.Runtime(self._logger)
        needs_plugins = not record or (self.metadata.get("attention") == "op" and not record.get("plugin_inside"))
        if backend == "tensorrt" and needs_plugins:
            try:
                load_plugins(runtime.get_plugin_registry())
            except LiteDetrError as error:
                # Without a record nobody knows whether the engine needs the library that was not built.
                if record or not isinstance(error.__cause__, FileNotFoundError):
                    raise
        self._engine = deserialize(trt, runtime, self._logger, artifact, record, gpu)
        self._prepare(trt, cuda.Device(), backend == "tensorrt-rtx")

    def _prepare(self, trt, device: cuda.Device, is_rtx: bool) -> None:
        engine, self._device, self._rtx = self._engine, device, is_rtx
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.outputs = tuple(name for name in names if not is_input[name])
        self._types = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
        profiles = {name: engine.get_tensor_profile_shape(name, 0) for name in names if is_input[name]}
        self._limits = {name: (_plain(low), _plain(high)) for name, (low, _, high) in profiles.items()}
        self.inputs = {
            name: tuple(low if low == high else None for low, high in zip(*limits))
            for name, limits in self._limits.items()
        }
        check_metadata(self.path, self.metadata, self.inputs, self.outputs, fixed=False)
        self._contexts: OrderedDict[tuple, _Context] = OrderedDict()  # by the inputs' shapes
        self._trt = trt
        try:
            self._workspace = 0 if is_rtx else device.allocate(engine.device_memory_size_v2)
            context = self._make_context()
            for name, (_, shape) in self._limits.items():
                context.set_input_shape(name, shape)
            shapes = {name: _plain(context.get_tensor_shape(name)) for name in names}
            sizes = {name: int(np.prod(shape)) * self._types[name].itemsize for name, shape in shapes.items()}
            self._addresses = {name: device.allocate(size) for name, size in sizes.items()}
            self._host = {name: device.allocate_host(size) for name, size in sizes.items()}
        except cuda.OutOfMemory as error:
            raise LiteDetrError(f"{self.path} cannot be prepared: {error}") from error

    def _make_context(self) -> tensorrt.IExecutionContext:
        """An execution context; those of TensorRT share one memory for activations, of which one is used at a time."""
        if self._rtx:  # captures graphs itself, for any shape
            config = self._engine.create_runtime_config()
            whole = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            config.cuda_graph_strategy = whole  # type: ignore[attr-defined]
            context = self._engine.create_execution_context(config)
        else:
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise self._failed("cannot be prepared")
        if not self._rtx:
            context.set_device_memory(self._workspace, self._engine.device_memory_size_v2)
        return context

    def run(self, feed: dict) -> dict:
        """Run on a dict of name -> array; return a dict of name -> array.  A batch of 0 gives empty arrays."""
        if 0 in map(len, feed.values()):
            shapes = {name: _plain(self._engine.get_tensor_shape(name))[1:] for name in self.outputs}
            return {name: np.empty((0, *np.maximum(shape, 0)), self._types[name]) for name, shape in shapes.items()}
        arrays = self._check(feed)
        context = self._context(tuple(arrays[name].shape for name in self.inputs))
        for name, array in arrays.items():
            # Through pinned memory, which the GPU reads by itself; what was read last is done with by now.
            pinned = self._host[name][: array.nbytes].view(array.dtype).reshape(array.shape)
            pinned[...] = array
            self._device.to_device(self._addresses[name], pinned)
        context.runs += 1  # the first also does what follows from new shapes, which must not become part of a graph
        if context.runs == 2 and not self._rtx:
            context.graph = self._device.capture(lambda: context.execution.execute_async_v3(self._device.stream))
        if context.graph is not None:
            self._device.launch(context.graph)
        elif not context.execution.execute_async_v3(self._device.stream):
            raise self._failed("fails to run")
        views = {}
        for name, shape in context.shapes.items():
            size = int(np.prod(shape)) * self._types[name].itemsize
            views[name] = self._host[name][:size].view(self._types[name]).reshape(shape)
            self._device.to_host(views[name], self._addresses[name])
        self._device.synchronize()
        return {name: view.copy() for name, view in views.items()}

    def close(self) -> None:
        """Give the GPU's memory back.  The session cannot run any more."""
        self._contexts.clear()
        self._device.close()

    def _context(self, shapes):
        """The context that is prepared for these input shapes; the one that was used longest ago makes room."""
        context = self._contexts.pop(shapes, None)
        if context is None:
            if len(self._contexts) == CONTEXTS:
                _, oldest = self._contexts.popitem(last=False)
                if oldest.graph is not None:
                    self._device.destroy(oldest.graph)
            reused = next(iter(self._contexts.values())).execution if self._rtx and self._contexts else None
            context = _Context(reused or self._make_context())
        self._contexts[shapes] = context
        if context.shapes is None or self._rtx:
            execution = context.execution
            if not all(execution.set_input_shape(name, shape) for name, shape in zip(self.inputs, shapes)):
                raise self._failed(f"cannot take inputs of the shapes {list(shapes)}")
            for name, address in self._addresses.items():
                execution.set_tensor_address(name, address)
            context.shapes = {name: _plain(execution.get_tensor_shape(name)) for name in self.outputs}
        return context

    def _check(self, feed):
        arrays = {}
        for name, (smallest, largest) in self._limits.items():
            if name not in feed:
                given = f"{', '.join(feed) or 'none'}. Give all of {', '.join(self._limits)}."
                raise LiteDetrError(f"the input {name!r} of {self.path} is missing; given: {given}")
            arrays[name] = array = np.asarray(feed[name])
            if array.dtype != self._types[name]:
                wanted = f"{self.path} takes {self._types[name]}. Convert it before the run."
                raise LiteDetrError(f"the input {name!r} is {array.dtype}; {wanted}")
            bounds = zip(smallest, array.shape, largest)
            if array.ndim != len(smallest) or not all(low <= size <= high for low, size, high in bounds):
                raise LiteDetrError(
                    f"the input {name!r} has the shape {list(array.shape)}; {self.path} was built for {list(smallest)} "
                    f"to {list(largest)}. Run smaller batches or other sizes, or build the engine with other --batch "
                    "and --image-size."
                )
        return arrays

    def _failed(self, what):
        errors, self._logger.errors = self._logger.errors, []
        said = f": {errors[0].strip()[:300]}" if errors else ""
        return LiteDetrError(
            f"{self.path} {what}{said}. If the GPU's memory is full, end what else runs on it; else build the engine "
            "again with the TensorRT that is installed here."
        )


@dataclass
class _Context:
    """What is ready for one set of input shapes; TensorRT-RTX has one execution for all."""

    execution: tensorrt.IExecutionContext
    shapes: dict[str, tuple[int, ...]] | None = None  # of the outputs
    runs: int = 0
    graph: object = None  # the CUDA graph of its work, from the second run on


def _plain(dims: tensorrt.Dims) -> tuple[int, ...]:
    return tuple(dims[i] for i in range(len(dims)))
