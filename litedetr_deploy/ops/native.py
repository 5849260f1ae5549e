"""Find and load the compiled libraries that the package installs into `litedetr_deploy/lib`."""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
from pathlib import Path

LIBRARIES = {
    "core": "liblitedetr_kda.so",
    "deepstream": "liblitedetr_deepstream.so",
    "onnxruntime": "liblitedetr_onnxruntime.so",
    "openvino": "liblitedetr_openvino.so",
    "tensorrt": "liblitedetr_tensorrt.so",
    "tensorrt-register": "liblitedetr_tensorrt_register.so",
}
# A folder that is searched first: for libraries built apart from the package (another compiler, another board).
PATH_VARIABLE = "LITEDETR_LIBRARY_PATH"

# KDA_ABI_VERSION, kda_dtype and kda_status in plugins/kda/kda.h
ABI_VERSION = 2
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
OK, INVALID_ARGUMENT = 0, 1


# The structures of kda.h, field by field.
class Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "num_queries", "num_tokens")),
        *((name, ctypes.c_int32) for name in ("num_heads", "head_dim", "num_levels", "num_points")),
        *((name, ctypes.c_int32) for name in ("reference_width", "key_aware", "dtype", "offset_dtype")),
        *((name, ctypes.c_int32) for name in ("int32_shapes", "reserved")),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "reference_points", "sampling_offsets")),
        *((name, ctypes.c_void_p) for name in ("spatial_shapes", "output")),
    ]


class Gradients(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("output", "query", "key", "value", "reference_points", "sampling_offsets")
    ]


class Executor(ctypes.Structure):
    _fields_ = [("run", ctypes.c_void_p), ("self", ctypes.c_void_p)]


_ARGUMENTS, _EXECUTOR = ctypes.POINTER(Arguments), ctypes.POINTER(Executor)
_MESSAGE = ctypes.c_char_p, ctypes.c_size_t
# Name -> type of the result, types of the arguments.
_FUNCTIONS = {
    "kda_cpu_isa": (ctypes.c_char_p,),
    "kda_cpu_workspace_size": (ctypes.c_size_t, _ARGUMENTS),
    "kda_cpu_check": (ctypes.c_int, _ARGUMENTS, *_MESSAGE),
    "kda_cpu_forward": (ctypes.c_int, _ARGUMENTS, ctypes.c_void_p, _EXECUTOR, *_MESSAGE),
    "kda_cpu_backward": (ctypes.c_int, _ARGUMENTS, ctypes.POINTER(Gradients), _EXECUTOR, *_MESSAGE),
    "kda_cuda_forward": (ctypes.c_int, _ARGUMENTS, ctypes.c_void_p, *_MESSAGE),  # the pointer is a cudaStream_t
}


def library(name: str) -> Path:
    """Return the path of a library.

    name: 'core' (the arithmetic), 'onnxruntime' (custom ops), 'openvino' (an extension), 'tensorrt' (plugins) or
        'tensorrt-register' (what registers them when it is opened).

    Raise ValueError for another name, and FileNotFoundError, which says how to build it, where it is not there.
    """
    if name not in LIBRARIES:
        raise ValueError(f"there is no library {name!r}; the libraries are {', '.join(map(repr, LIBRARIES))}")
    folders = _folders()
    if found := [folder / LIBRARIES[name] for folder in folders if (folder / LIBRARIES[name]).is_file()]:
        return found[0]
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
    """Return the 'core' library; raise RuntimeError where it is missing, does not load, or has another ABI version."""
    try:
        path = library("core")
        core = ctypes.CDLL(str(path))
    except OSError as error:  # FileNotFoundError among them
        raise RuntimeError(f"the native attention kernels cannot be loaded: {error}") from error
    if core.kda_abi_version() != ABI_VERSION:
        raise RuntimeError(
            f"{path} has ABI version {core.kda_abi_version()} and this package needs {ABI_VERSION}: "
            f"install the package again so that both are of one version"
        )
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(core, name)
        function.restype, function.argtypes = result, arguments
    return core
