"""ONNX models in OpenVINO on the CPU, with the attention ops as its extension."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from ..artifact import METADATA_KEY, cache_folder, check_file, damaged, opset_version, parse_metadata
from ..errors import LiteDetrError, Notice, not_installed
from ..files import check_writable
from ..machine import bounded_threads
from ..ops import native, schema
from .session import check_metadata, check_op_version, find_failure

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}  # in which OpenVINO computes what the graph has in FP32


def import_openvino():
    """Return the `openvino` module; raise LiteDetrError when it cannot be imported."""
    try:
        import openvino
    except ImportError as error:
        raise (not_installed(error, "Running a model in OpenVINO") or error) from error
    return openvino


def make_core():
    """Return an `openvino.Core` with the attention ops; raise LiteDetrError where their library is missing or is built
    for another OpenVINO."""
    core = import_openvino().Core()
    try:
        core.add_extension(str(native.library("openvino")))
    except FileNotFoundError as error:
        raise LiteDetrError(str(error)) from error
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1]
        raise LiteDetrError(f"OpenVINO cannot use the op library: {said}.") from error
    return core


class OpenVinoSession:
    """An ONNX artifact in OpenVINO, ready to run: what `OnnxSession` is to ONNX Runtime.

    artifact: path of an ONNX model, or the serialized model as bytes.
    threads: of all that runs at a time, at most one a logical core; OpenVINO's choice when not given.
    precision: 'fp32', or 'bf16' where the processor computes in it: OpenVINO then rounds what the graph has in FP32;
        the attention ops, which take FP32 from it, do not.
    throughput: `stream` has several runs in progress, each on few threads, instead of one on all.

    inputs: name -> shape, a tuple with an int where the size is fixed and None where it is dynamic
    outputs: names
    metadata: what `litedetr export` wrote into the model

    Compiled models of files are kept in the user's cache.  Raises LiteDetrError for what cannot be loaded here.
    """

    def __init__(
        self, artifact, threads: int | None = None, precision: str | None = None, throughput: bool = False
    ):  # fmt: skip
        name = "the given bytes" if isinstance(artifact, bytes) else os.fspath(artifact)
        if not isinstance(artifact, bytes):
            check_file(name, "an ONNX model, for instance one that `litedetr export` made")
        check_op_version(name, {}, opset_version(artifact, schema.DOMAIN))
        openvino, no_library = import_openvino(), None
        try:
            core = make_core()
        except LiteDetrError as error:
            core, no_library = openvino.Core(), error  # which matters only to a model that holds our ops
        settings = settings_of(core, threads, precision, throughput)
        if not isinstance(artifact, bytes):
            settings |= _cache()
        try:
            model = core.read_model(artifact)
        except RuntimeError as error:
            raise _explain(name, str(error), no_library) from error
        self.metadata = parse_metadata(_entry(model), name)
        self.inputs = {value.any_name: _shape(value) for value in model.inputs}
        self.outputs = tuple(sorted(name for value in model.outputs for name in value.get_names()))
        check_op_version(name, self.metadata)
        check_metadata(name, self.metadata, self.inputs, {n: _shape(v) for v in model.outputs for n in v.get_names()})
        try:
            compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise _explain(name, str(error), no_library) from error
        self._name, self._ports = name, [(value, sorted(value.get_names())) for value in compiled.outputs]
        # One more than compute at a time, so that the next is ready when one of them ends.
        count = 1 + compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") if throughput else 1
        self._requests = [compiled.create_infer_request() for _ in range(count)]

    def run(self, feed: dict, copy: bool = True) -> dict:
        """Run on a dict of name -> array; return a dict of name -> array.  A batch of 0 gives empty arrays.

        copy: False returns arrays that the next run overwrites.
        """
        if 0 in map(len, feed.values()):
            return {name: _empty(port) for port, names in self._ports for name in names}
        request, arrays = self._start(self._requests[0], feed)
        return self._finish(request, arrays, copy)

    def stream(self, feeds: Iterable[dict]) -> Iterator[dict]:
        """Run on each of `feeds` as `run` does, several at a time; yield what they give in their order."""
        running: deque = deque()
        try:
            for feed, request in zip(feeds, itertools.cycle(self._requests)):
                running.append(self._start(request, feed))
                if len(running) == len(self._requests):
                    yield self._finish(*running.popleft())
            while running:
                yield self._finish(*running.popleft())
        finally:
            for request, _ in running:
                with contextlib.suppress(RuntimeError):
                    request.wait()

    def _start(self, request, feed):
        """Start the request; return it with the arrays that it reads, which must live until it ends."""
        if missing := self.inputs.keys() - feed.keys():
            given = f"{', '.join(feed) or 'none'}. Give all of {', '.join(self.inputs)}."
            raise LiteDetrError(f"the input {min(missing)!r} of {self._name} is missing; given: {given}")
        try:
            # Not `infer`: with one thread OpenVINO 2026.4 loses its errors, those of our ops among them.
            arrays = {name: np.ascontiguousarray(feed[name]) for name in self.inputs}
            request.start_async(arrays, share_inputs=True)
        except (RuntimeError, TypeError) as error:
            raise self._failed(error) from error
        return request, arrays

    def _finish(self, request, arrays, copy=True):
        try:
            request.wait()
        except RuntimeError as error:
            raise self._failed(error) from error
        values = [(request.get_tensor(port).data, names) for port, names in self._ports]
        return {name: value.copy() if copy else value for value, names in values for name in names}

    def _failed(self, error):
        said = str(error).strip().splitlines()[-1]
        return LiteDetrError(f"OpenVINO fails to run {self._name}: {said}. Give the inputs that the model takes.")


def settings_of(
    core, threads: int | None, precision: str | None = None, throughput: bool = False
) -> dict[str, str | int]:
    """Return what OpenVINO compiles a model for the CPU with; the arguments are those of `OpenVinoSession`."""
    precision = precision or "fp32"
    if precision not in PRECISIONS:
        raise LiteDetrError(f"precision is {precision!r}; OpenVINO computes in {' or '.join(PRECISIONS)}.")
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise LiteDetrError(
            "precision is 'bf16', and this processor does not compute in it (it has neither AVX512_BF16 nor AMX): "
            "OpenVINO would only emulate it, slowly. Use 'fp32', or a model exported for INT8."
        )
    settings: dict[str, str | int] = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision], "PERFORMANCE_HINT": "THROUGHPUT" if throughput else "LATENCY"
    }  # fmt: skip
    if (threads := bounded_threads(threads)) is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    return settings


def _cache() -> dict:
    folder = cache_folder() / "openvino"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
    except (OSError, LiteDetrError) as error:
        warnings.warn(f"the compiled model is not kept: {folder} cannot be used ({error})", Notice, 4)
        return {}
    return {"CACHE_DIR": str(folder)}


def _entry(model) -> str:
    """The metadata as it stands in an ONNX file: OpenVINO keeps what it does not know under 'framework'."""
    path = ["framework", METADATA_KEY]
    return model.get_rt_info(path).astype(str) if model.has_rt_info(path) else "{}"


def _shape(value) -> tuple:
    return tuple(side.get_length() if side.is_static else None for side in value.partial_shape)


def _empty(value) -> np.ndarray:
    """An output for a batch of 0; a size that the model leaves open is 0 as well."""
    return np.empty((0, *(side or 0 for side in _shape(value)[1:])), value.element_type.to_dtype())


def _explain(name: str, said: str, no_library: LiteDetrError | None) -> LiteDetrError:
    """Return the error for OpenVINO's failure to load `name`."""
    rows, why = find_failure("openvino", said)
    if why == "damaged":
        return damaged(name, "OpenVINO cannot parse it")
    if why == "op" and no_library is not None:
        return LiteDetrError(f"{name} holds the fused attention ops, and their library is not usable. {no_library}")
    detail = said.strip().splitlines()[-1].rstrip(".")
    return LiteDetrError(rows[why]["message"].format(name=name, detail=detail, version=schema.VERSION))
