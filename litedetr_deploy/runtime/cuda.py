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
        self._held = []  # (what releases a thing, the thing), in the order in which they were made
        self._cuda = _bindings()
        stream = _call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking)
        self._stream = self._hold(self._cuda.cudaStreamDestroy, stream)
        self.stream = int(stream)

    def _hold(self, release, thing):
        self._held.append((release, thing))
        return thing

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes on the GPU."""
        return self._hold(self._cuda.cudaFree, int(_call(self._cuda.cudaMalloc, max(size, 1))))

    def allocate_host(self, size: int) -> np.ndarray:
        """Return `size` bytes of the host, uint8, that the GPU copies without a detour."""
        address = int(_call(self._cuda.cudaHostAlloc, max(size, 1), self._cuda.cudaHostAllocDefault))
        self._hold(self._cuda.cudaFreeHost, address)
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
        return self._hold(self._cuda.cudaGraphExecDestroy, executable)

    def launch(self, graph) -> None:
        _call(self._cuda.cudaGraphLaunch, graph, self._stream)

    def destroy(self, graph) -> None:
        self._held.remove((self._cuda.cudaGraphExecDestroy, graph))
        _call(self._cuda.cudaGraphExecDestroy, graph)

    def close(self) -> None:
        """Give everything back; what was allocated must not be used any more."""
        if self._held:
            self._cuda.cudaStreamSynchronize(self._stream)
        while self._held:
            release, thing = self._held.pop()
            release(thing)

    def __del__(self):
        self.close()


class OutOfMemory(LiteDetrError):
    """The GPU has too little memory left."""


def _bindings():
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        fix = "Install them with `pip install litedetr-deploy[gpu]`."
        raise LiteDetrError(f"NVIDIA's CUDA bindings for Python cannot be imported ({error}). {fix}") from error
    return runtime


def _call(function, *arguments):
    """Call a function of the bindings and return what it gives; raise LiteDetrError where CUDA reports an error."""
    runtime = _bindings()
    try:
        error, *values = function(*arguments)
    except Exception as missing:  # the bindings' own, where the driver's library is not there
        fix = "Run this on a machine with an NVIDIA GPU and its driver."
        raise LiteDetrError(f"no GPU here (CUDA: {missing}). {fix}") from missing
    codes = runtime.cudaError_t
    if error == codes.cudaSuccess:
        return values[0] if values else None
    text = runtime.cudaGetErrorString(error)[1].decode()
    if error == codes.cudaErrorMemoryAllocation:
        fix = "End what else runs on it, or build the engine for a smaller batch or image size."
        raise OutOfMemory(f"the GPU has too little memory left: {function.__name__}{arguments} fails ({text}). {fix}")
    if error in (codes.cudaErrorNoDevice, codes.cudaErrorInsufficientDriver):
        fix = "Run this on a machine with an NVIDIA GPU, and a driver as new as the installed CUDA bindings."
        raise LiteDetrError(f"no GPU here (CUDA: {text}). {fix}")
    fix = "Run the program again; if it stays, look at the driver's log (dmesg)."
    raise LiteDetrError(f"CUDA fails in {function.__name__}: {text} ({error.name}). {fix}")
