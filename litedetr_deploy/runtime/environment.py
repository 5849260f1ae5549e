"""What of this machine and this installation matters to a model that is to run here."""

import ctypes
import platform
import shutil
import subprocess
from dataclasses import dataclass

import numpy as np

from .. import __version__
from ..errors import LiteDetrError
from ..machine import describe_cpu, installed_version, usable_cores
from ..ops import native, schema
from .session import create_session, import_onnxruntime, register_ops
from .tensorrt import MODULES, import_tensorrt

OK, ABSENT, BROKEN = "ok", "absent", "broken"  # absent: not here, and nothing on the CPU needs it

# (name, distributions that bring it, needed to run a model on the CPU, what it is for and how to get it)
PACKAGES = (
    ("numpy", ("numpy",), True, "pip install numpy"),
    ("pillow", ("pillow",), True, "pip install pillow"),
    ("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), True,
     "runs the models: pip install litedetr-deploy[onnxruntime]"),
    ("torch", ("torch",), False, "export and verify need it: pip install litedetr-deploy[export]"),
    ("onnx", ("onnx",), False, "export needs it: pip install litedetr-deploy[export]"),
    ("pycocotools", ("pycocotools",), False, "evaluate needs it: pip install litedetr-deploy[evaluate]"),
    ("openvino", ("openvino",), False, "a rival in the benchmarks: pip install litedetr-deploy[benchmark]"),
    ("cuda-bindings", ("cuda-bindings",), False, "runs engines: pip install litedetr-deploy[gpu]"),
)  # fmt: skip
CPU_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "sve", "i8mm", "bf16",
)  # fmt: skip


@dataclass
class Finding:
    """One thing that was looked for."""

    topic: str
    name: str
    state: str  # OK, ABSENT or BROKEN
    value: str  # version, path, or what went wrong
    remedy: str = ""  # how to get it where it is absent or broken


def inspect_environment() -> list[Finding]:
    """Return a list of `Finding`: packages, native libraries, ONNX Runtime with our ops, CPU and GPU."""
    return [*_packages(), *_libraries(), *_onnxruntime(), *_cpu(), *_gpu()]


def broken(findings: list[Finding]) -> list[str]:
    """Return the names of what must be mended before models run on the CPU."""
    return [finding.name for finding in findings if finding.state == BROKEN]


def _packages():
    yield Finding("packages", "litedetr-deploy", OK, __version__)
    yield Finding("packages", "python", OK, f"{platform.python_version()} on {platform.platform()}")
    for name, distributions, needed, remedy in PACKAGES:
        versions = [version for version in map(installed_version, distributions) if version]
        if versions:
            yield Finding("packages", name, OK, versions[0])
        else:
            yield Finding("packages", name, BROKEN if needed else ABSENT, "not installed", remedy)
    for backend in MODULES:  # as `litedetr build` imports it: a folder of that name is not the package
        try:
            yield Finding("packages", backend, OK, import_tensorrt(backend).__version__)
        except LiteDetrError as error:
            yield Finding("packages", backend, ABSENT, "not installed", f"builds and runs engines: {error}")


def _libraries():
    for name, needed in (("core", True), ("onnxruntime", True), ("tensorrt", False)):
        try:
            yield Finding("native libraries", name, OK, str(native.library(name)))
        except FileNotFoundError as error:
            yield Finding("native libraries", name, BROKEN if needed else ABSENT, "not found", str(error))
            continue
        if name == "core":
            try:
                yield Finding("native libraries", "CPU kernels", OK, native.load_core().kda_cpu_isa().decode())
            except RuntimeError as error:
                yield Finding("native libraries", "CPU kernels", BROKEN, "cannot be used", str(error))


def _onnxruntime():
    try:
        ort = import_onnxruntime()
    except LiteDetrError as error:
        yield Finding("ONNX Runtime", "import", BROKEN, "fails", str(error))
        return
    yield Finding("ONNX Runtime", "providers", OK, ", ".join(ort.get_available_providers()))
    try:
        native.library("onnxruntime")
    except FileNotFoundError:
        return  # reported above
    try:
        register_ops(ort.SessionOptions())
        yield Finding("ONNX Runtime", "op library", OK, "registers")
    except LiteDetrError as error:
        yield Finding("ONNX Runtime", "op library", BROKEN, "cannot be registered", str(error))
        return
    try:
        model = _one_op_model()
    except ImportError:
        yield Finding("ONNX Runtime", "op", ABSENT, "not tried", "to try the op here, pip install onnx")
        return
    try:
        _run_one_op(model)
        yield Finding("ONNX Runtime", "op", OK, f"{schema.KEY_AWARE} runs and is right")
    except Exception as error:  # ONNX Runtime's classes share no base
        remedy = f"{error}. Build the op library again: pip install --force-reinstall ."
        yield Finding("ONNX Runtime", "op", BROKEN, "does not run", remedy)


def _one_op_model():
    """Return a model, as bytes, of one key-aware attention op: one head of 4 channels, one level, one point."""
    from onnx import TensorProto, helper

    types = {"I": TensorProto.INT64}
    inputs = {name: letter for name, letter, optional in schema.INPUTS[schema.KEY_AWARE] if not optional}
    node = helper.make_node(
        schema.KEY_AWARE, list(inputs), [schema.OUTPUT], domain=schema.DOMAIN, num_heads=1, num_points=1,
        **schema.PLUGIN_ATTRIBUTES,
    )  # fmt: skip
    values = [
        helper.make_tensor_value_info(name, types.get(letter, TensorProto.FLOAT), None)
        for name, letter in inputs.items()
    ]
    output = helper.make_tensor_value_info(schema.OUTPUT, TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    graph = helper.make_graph([node], "one_op", values, [output])
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def _run_one_op(model):
    """Run `_one_op_model` on a 1x1 map sampled at its centre, which must give back the value there."""
    value = np.arange(4, dtype=np.float32).reshape(1, 1, 4)
    feed = {
        "query": np.ones((1, 1, 4), np.float32),
        "value": value,
        "reference_points": np.full((1, 1, 1, 2), 0.5, np.float32),
        "sampling_offsets": np.zeros((1, 1, 2), np.float32),
        "spatial_shapes": np.ones((1, 2), np.int64),
    }
    [output] = create_session(model).run(None, feed)
    if not np.allclose(output, value):
        raise ValueError(f"it gives {output.tolist()} where {value.tolist()} is right")


def _cpu():
    name, flags = describe_cpu()
    yield Finding("CPU", "model", OK, name)
    yield Finding("CPU", "cores for this process", OK, str(usable_cores()))
    features = " ".join(feature for feature in CPU_FEATURES if feature in flags)
    yield Finding("CPU", "features", OK, features or "not known")


def _gpu():
    try:
        ctypes.CDLL("libcuda.so.1")
        yield Finding("GPU", "driver library", OK, "libcuda.so.1 loads")
    except OSError:
        yield Finding("GPU", "driver library", ABSENT, "no libcuda.so.1", "for an NVIDIA GPU install NVIDIA's driver")
    if shutil.which("nvidia-smi") is None:
        yield Finding("GPU", "devices", ABSENT, "no nvidia-smi", "for an NVIDIA GPU install NVIDIA's driver")
        return
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        yield Finding("GPU", "devices", OK, answer.replace("\n", "; "))
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("GPU", "devices", ABSENT, "nvidia-smi fails", f"{error}; check NVIDIA's driver")
