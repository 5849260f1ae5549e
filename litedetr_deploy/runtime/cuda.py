"""The little of CUDA that a session needs, through NVIDIA's Python bindings: memory, copies, a stream, graphs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from ..errors import LiteDetrError


@dataclass(frozen=True)
class Gpu:
    name: str
    compute_capability: str  # '8.6'


def find_gpu() -> Gpu:
    """Return the GPU that CUDA numbers 0; raise LiteDetrError, which says why, where there is none to be used."""
    properties = _call(_bindings().cudaGetDeviceProperties, 0)
    return Gpu(properties.name.decode(), f"{properties.major}.{properties.minor}")


class Device:
    """One stream on the GPU, and the memory that is used on it."""

    def __init__(self):
        self._stream, self._device_memory, self._host_memory, self._graphs = None, [], [], []
        self._cuda = _bindings()
        self._stream = _call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes on the GPU."""
        address = int(_call(self._cuda.cudaMalloc, max(size, 1)))
        self._device_memory.append(address)
        return address

    def allocate_host(self, size: int) -> np.ndarray:
        """Return `size` bytes of the host, uint8, that the GPU copies without a detour."""
        address = int(_call(self._cuda.cudaHostAlloc, max(size, 1), self._cuda.cudaHostAllocDefault))
        self._host_memory.append(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def to_device(self, address: int, array: np.ndarray) -> None:
        """Copy the contiguous `array` to `address`, on the stream."""
        self._copy(address, array.ctypes.data, array.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def to_host(self, array: np.ndarray, address: int) -> None:
        """Fill the contiguous `array` from `address`, on the stream."""
        self._copy(array.ctypes.data, address, array.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def _copy(self, target, source, size, kind):
        if size:
            _call(self._cuda.cudaMemcpyAsync, target, source, size, kind, self._stream)

    def synchronize(self) -> None:
        _call(self._cuda.cudaStreamSynchronize, self._stream)

    def capture(self, enqueue):
        """Return a CUDA graph of what `enqueue()` puts on the stream, which is not run; None where that fails."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call(self._cuda.cudaStreamBeginCapture, self._stream, mode)
        captured = enqueue()
        error, graph = self._cuda.cudaStreamEndCapture(self._stream)
        if not captured or error != self._cuda.cudaError_t.cudaSuccess:
            self._cuda.cudaGetLastError()  # or the next call would report it
            return None
        executable = _call(self._cuda.cudaGraphInstantiate, graph, 0)
        _call(self._cuda.cudaGraphDestroy, graph)
        self._graphs.append(executable)
        return executable

    def launch(self, graph) -> None:
        _call(self._cuda.cudaGraphLaunch, graph, self._stream)

    def destroy(self, graph) -> None:
        self._graphs.remove(graph)
        _call(self._cuda.cudaGraphExecDestroy, graph)

    def close(self) -> None:
        """Give everything back; what was allocated must not be used any more."""
        if self._stream is None:
            return
        self._cuda.cudaStreamSynchronize(self._stream)
        for release, things in (
            (self._cuda.cudaGraphExecDestroy, self._graphs),
            (self._cuda.cudaFree, self._device_memory),
            (self._cuda.cudaFreeHost, self._host_memory),
            (self._cuda.cudaStreamDestroy, [self._stream]),
        ):
            for thing in things:
                release(thing)
        self._graphs, self._device_memory, self._host_memory, self._stream = [], [], [], None

    def __del__(self):
        self.close()


class OutOfMemory(LiteDetrError):
    """The GPU has too little memory left."""


def _bindings():
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise LiteDetrError(
            f"NVIDIA's CUDA bindings for Python cannot be imported ({error}). Install them with "
            "`pip install litedetr-deploy[gpu]`."
        ) from error
    return runtime


def _call(function, *arguments):
    """Call a function of the bindings and return what it gives; raise LiteDetrError where CUDA reports an error."""
    runtime = _bindings()
    try:
        error, *values = function(*arguments)
    except Exception as missing:  # the bindings' own, where the driver's library is not there
        raise LiteDetrError(
            f"no GPU here (CUDA: {missing}). Run this on a machine with an NVIDIA GPU and its driver."
        ) from missing
    codes = runtime.cudaError_t
    if error == codes.cudaSuccess:
        return values[0] if values else None
    text = runtime.cudaGetErrorString(error)[1].decode()
    if error == codes.cudaErrorMemoryAllocation:
        raise OutOfMemory(
            f"the GPU has too little memory left: {function.__name__}{arguments} fails ({text}). End what else runs on "
            "it, or build the engine for a smaller batch or image size."
        )
    if error in (codes.cudaErrorNoDevice, codes.cudaErrorInsufficientDriver):
        raise LiteDetrError(
            f"no GPU here (CUDA: {text}). Run this on a machine with an NVIDIA GPU, and a driver as new as the "
            "installed CUDA bindings."
        )
    raise LiteDetrError(
        f"CUDA fails in {function.__name__}: {text} ({error.name}). Run the program again; if it stays, look at the "
        "driver's log (dmesg)."
    )
