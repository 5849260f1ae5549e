"""Finds and loads the compiled libraries that the package installs into `litedetr_deploy/lib`."""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
from pathlib import Path

LIBRARIES = {
    "core": "liblitedetr_kda.so",
    "onnxruntime": "liblitedetr_onnxruntime.so",
    "tensorrt": "liblitedetr_tensorrt.so",
}
# A folder that is searched first: for libraries built apart from the package (another compiler, another board).
PATH_VARIABLE = "LITEDETR_LIBRARY_PATH"
# KDA_ABI_VERSION in plugins/kda/kda.h
ABI_VERSION = 1

# kda_dtype and kda_status in kda.h
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
OK, INVALID_ARGUMENT, UNSUPPORTED = 0, 1, 2


class Arguments(ctypes.Structure):
    """kda_arguments in kda.h, field by field."""

    _fields_ = [
        ("batch", ctypes.c_int64),
        ("num_queries", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("num_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("num_levels", ctypes.c_int32),
        ("num_points", ctypes.c_int32),
        ("reference_width", ctypes.c_int32),
        ("key_aware", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("offset_dtype", ctypes.c_int32),
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("reference_points", ctypes.c_void_p),
        ("sampling_offsets", ctypes.c_void_p),
        ("spatial_shapes", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
    ]


class Gradients(ctypes.Structure):
    """kda_gradients in kda.h."""

    _fields_ = [
        ("output", ctypes.c_void_p),
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("reference_points", ctypes.c_void_p),
        ("sampling_offsets", ctypes.c_void_p),
    ]


class Executor(ctypes.Structure):
    """kda_executor in kda.h."""

    _fields_ = [("run", ctypes.c_void_p), ("self", ctypes.c_void_p)]


def library(name: str) -> Path:
    """The path of a compiled library: 'core' (the arithmetic), 'onnxruntime' (custom ops) or 'tensorrt' (plugins).

    Raises:
        ValueError: no library has that name.
        FileNotFoundError: it was not built; the message says where it was looked for and how to build it.
    """
    if name not in LIBRARIES:
        raise ValueError(f"there is no library {name!r}; the libraries are {', '.join(map(repr, LIBRARIES))}")
    folders = _folders()
    for folder in folders:
        path = folder / LIBRARIES[name]
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{LIBRARIES[name]} (the {name!r} library) is not in {' or '.join(map(str, folders))}. It is compiled when "
        f"the package is installed: run `pip install .` in the source folder and read the lines that CMake prints "
        f"about it; or set {PATH_VARIABLE} to the folder of a library that you built yourself."
    )


def _folders() -> list[Path]:
    package = __package__.partition(".")[0]
    folders = [Path(folder) for folder in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if folder]
    # In an editable install the libraries lie apart from the sources, where the distribution's metadata is.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        folders.append(Path(str(importlib.metadata.distribution("litedetr-deploy").locate_file(f"{package}/lib"))))
    beside = Path(__file__).parents[1] / "lib"
    return folders if beside in folders else [*folders, beside]


@functools.cache
def load_core() -> ctypes.CDLL:
    """The 'core' library with its argument types set.

    Raises:
        RuntimeError: it is missing, does not load, or has another ABI version.
    """
    try:
        path = library("core")
        core = ctypes.CDLL(str(path))
    except OSError as error:  # FileNotFoundError among them
        raise RuntimeError(f"the native attention kernels cannot be loaded: {error}") from error
    core.kda_abi_version.restype = ctypes.c_int32
    if core.kda_abi_version() != ABI_VERSION:
        raise RuntimeError(
            f"{path} has ABI version {core.kda_abi_version()} and this package needs {ABI_VERSION}: "
            f"install the package again so that both are of one version"
        )
    core.kda_cpu_isa.restype = ctypes.c_char_p
    core.kda_cpu_workspace_size.restype = ctypes.c_size_t
    core.kda_cpu_workspace_size.argtypes = [ctypes.POINTER(Arguments)]
    core.kda_cpu_check.restype = ctypes.c_int
    core.kda_cpu_check.argtypes = [ctypes.POINTER(Arguments), ctypes.c_char_p, ctypes.c_size_t]
    core.kda_cpu_forward.restype = ctypes.c_int
    core.kda_cpu_forward.argtypes = [
        ctypes.POINTER(Arguments),
        ctypes.c_void_p,
        ctypes.POINTER(Executor),
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    return core


@functools.cache
def load_backward() -> ctypes.CDLL:
    """The 'core' library with the argument types of its backward pass set.

    Raises:
        RuntimeError: as `load_core`.
    """
    core = load_core()
    core.kda_cpu_backward.restype = ctypes.c_int
    core.kda_cpu_backward.argtypes = [
        ctypes.POINTER(Arguments),
        ctypes.POINTER(Gradients),
        ctypes.POINTER(Executor),
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    return core


@functools.cache
def load_cuda() -> ctypes.CDLL:
    """The 'core' library with the argument types of its CUDA part set.  Built without nvcc, it answers UNSUPPORTED.

    Raises:
        RuntimeError: as `load_core`.
    """
    core = load_core()
    core.kda_cuda_forward.restype = ctypes.c_int
    core.kda_cuda_forward.argtypes = [
        ctypes.POINTER(Arguments),
        ctypes.c_void_p,  # cudaStream_t
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    return core
