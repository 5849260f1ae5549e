"""What of this machine and this installation matters to a model that is to run here."""

import ctypes
import platform
import subprocess
from dataclasses import dataclass

import numpy as np

from .. import __version__
from ..errors import LiteDetrError
from ..machine import describe_cpu, installed_version, usable_cores
from ..ops import native, schema
from .openvino import make_core
from .session import import_onnxruntime, open_session, read_data, register_ops
from .tensorrt import MODULES, import_tensorrt

OK, ABSENT, BROKEN = "ok", "absent", "broken"  # absent: not here, and nothing on the CPU needs it


@dataclass
class Finding:
    """One thing that was looked for."""

    topic: str
    name: str
    state: str  # OK, ABSENT or BROKEN
    value: str  # version, path, or what went wrong
    remedy: str = ""  # how to get it where it is absent or broken


def inspect_environment() -> list[Finding]:
    """Return what was looked for of packages, native libraries, runtimes with our ops, CPU and GPU."""
    topics = {
        "packages": _packages, "native libraries": _libraries, "ONNX Runtime": _onnxruntime, "OpenVINO": _openvino,
        "CPU": _cpu, "GPU": _gpu,
    }  # fmt: skip
    return [Finding(topic, *found) for topic, look in topics.items() for found in look()]


def broken(findings: list[Finding]) -> list[str]:
    """Return the names of what must be mended before models run on the CPU."""
    return [finding.name for finding in findings if finding.state == BROKEN]


# Each of these yields (name, state, value, remedy) of a topic, as `Finding` has them.


def _packages():
    yield "litedetr-deploy", OK, __version__
    yield "python", OK, f"{platform.python_version()} on {platform.platform()}"
    for package in read_data("environment.toml")["package"]:
        version = next(filter(None, map(installed_version, package["distributions"])), None)
        missing = (BROKEN if package["needed"] else ABSENT, "not installed", package["remedy"])
        yield package["distributions"][0], *((OK, version) if version else missing)
    for backend in MODULES:  # as `litedetr build` imports it: a folder of that name is not the package
        try:
            yield backend, OK, import_tensorrt(backend).__version__
        except LiteDetrError as error:
            yield backend, ABSENT, "not installed", f"builds and runs engines: {error}"


def _libraries():
    for name, state in (("core", BROKEN), ("onnxruntime", BROKEN), ("openvino", ABSENT), ("tensorrt", ABSENT)):
        try:
            yield name, OK, str(native.library(name))
            if name == "core":
                yield "CPU kernels", OK, native.load_core().kda_cpu_isa().decode()
        except FileNotFoundError as error:
            yield name, state, "not found", str(error)
        except RuntimeError as error:
            yield "CPU kernels", BROKEN, "cannot be used", str(error)


def _onnxruntime():
    try:
        ort = import_onnxruntime()
    except LiteDetrError as error:
        yield "import", BROKEN, "fails", str(error)
        return
    yield "providers", OK, ", ".join(ort.get_available_providers())
    try:
        native.library("onnxruntime")
        register_ops(ort.SessionOptions())
        yield "op library", OK, "registers"
    except FileNotFoundError:
        return  # reported above
    except LiteDetrError as error:
        yield "op library", BROKEN, "cannot be registered", str(error)
        return
    yield from _op("onnxruntime", BROKEN)


def _openvino():
    try:
        capabilities = make_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except LiteDetrError as error:  # of the package and of the library it was said already whether they are here
        here = installed_version("openvino") and isinstance(error.__cause__, RuntimeError)
        yield "op library", BROKEN if here else ABSENT, "cannot be used", str(error)
        return
    yield "op library", OK, "loads"
    known = [name for name in ("FP32", "BF16", "FP16", "INT8") if name in capabilities]
    yield "precisions", OK, " ".join(known)
    yield from _op("openvino", ABSENT)


def _op(runtime, state):
    try:
        _run_one_op(runtime)
        yield "op", OK, f"{schema.KEY_AWARE} runs and is right"
    except ImportError:
        yield "op", ABSENT, "not tried", "to try the op here, pip install onnx"
    except Exception as error:  # ONNX Runtime's classes share no base
        yield "op", state, "does not run", f"{error}. Build the op library again: pip install --force-reinstall ."


def _run_one_op(runtime: str) -> None:
    """Run a key-aware attention op, of one head of 4 channels, one level and one point, on a 1x1 map sampled at its
    centre, which must give back the value there."""
    from onnx import helper

    value = np.arange(4, dtype=np.float32).reshape(1, 1, 4)
    feed: dict[str, np.ndarray] = {
        "query": np.ones_like(value), "value": value, "reference_points": np.full((1, 1, 1, 2), 0.5, np.float32),
        "sampling_offsets": np.zeros((1, 1, 2), np.float32), "spatial_shapes": np.ones((1, 2), np.int64),
    }  # fmt: skip
    node = helper.make_node(
        schema.KEY_AWARE, list(feed), [schema.OUTPUT], domain=schema.DOMAIN, num_heads=1, num_points=1,
        **schema.PLUGIN_ATTRIBUTES,
    )  # fmt: skip
    types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feed.items()}
    inputs = [helper.make_tensor_value_info(name, kind, feed[name].shape) for name, kind in types.items()]
    output = helper.make_tensor_value_info(schema.OUTPUT, types["value"], value.shape)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    model = helper.make_model(helper.make_graph([node], "one_op", inputs, [output]), opset_imports=opsets, ir_version=8)
    result = open_session(model.SerializeToString(), runtime=runtime).run(feed)[schema.OUTPUT]
    if not np.allclose(result, value):
        raise ValueError(f"it gives {result.tolist()} where {value.tolist()} is right")


def _cpu():
    name, flags = describe_cpu()
    yield "model", OK, name
    yield "cores for this process", OK, str(usable_cores())
    known = read_data("environment.toml")["cpu_features"]
    yield "features", OK, " ".join(feature for feature in known if feature in flags) or "not known"


def _gpu():
    remedy = "for an NVIDIA GPU install NVIDIA's driver"
    try:
        ctypes.CDLL("libcuda.so.1")
        yield "driver library", OK, "libcuda.so.1 loads"
    except OSError:
        yield "driver library", ABSENT, "no libcuda.so.1", remedy
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        yield "devices", OK, answer.replace("\n", "; ")
    except FileNotFoundError:
        yield "devices", ABSENT, "no nvidia-smi", remedy
    except (OSError, subprocess.SubprocessError) as error:
        yield "devices", ABSENT, "nvidia-smi fails", f"{error}; check NVIDIA's driver"
