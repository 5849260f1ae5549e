"""The plugin library in TensorRT's own plugin registry.

The lean runtime has the registry without the builder and needs no GPU for it.  What TensorRT does with a plugin after
that is driven by plugins/tests/tensorrt_harness.cpp.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from litedetr_deploy.ops import native, schema
from litedetr_deploy.runtime import tensorrt

trt = pytest.importorskip("tensorrt_lean", reason="tensorrt-lean-cu13 is not installed")

OPS = (schema.KEY_AWARE, schema.PLAIN)
BUILD_FIELDS = {"num_heads": 8, "num_points": 4}
ENGINE_FIELDS = {"serialization_version": 1, **BUILD_FIELDS, "num_inputs": 5}


def find(name):
    try:
        return str(native.library(name))
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def library():
    return find("tensorrt")


@pytest.fixture(scope="module")
def registry(library):
    registry = trt.get_plugin_registry()
    tensorrt.load_plugins(registry)  # which another test of this process may have done already
    return registry


def create(registry, op, fields, phase):
    """The plugin, or None where it is refused.  An integer becomes an int32 field, an array one of its own type."""
    arrays = {name: np.array([value], np.int32) if isinstance(value, int) else value for name, value in fields.items()}
    types = {np.dtype(np.int32): trt.PluginFieldType.INT32, np.dtype(np.float32): trt.PluginFieldType.FLOAT32}
    collection = trt.PluginFieldCollection(
        [trt.PluginField(name, array, types[array.dtype]) for name, array in arrays.items()]
    )
    return registry.get_creator(op, str(schema.VERSION), "").create_plugin("layer", collection, phase)


def test_registry_lists_both_creators(registry):
    listed = {creator.name: creator for creator in registry.all_creators}
    for op in OPS:
        assert isinstance(listed[op], trt.IPluginCreatorV3One)
        assert listed[op].plugin_version == schema.PLUGIN_ATTRIBUTES["plugin_version"]
        assert listed[op].plugin_namespace == schema.PLUGIN_ATTRIBUTES["plugin_namespace"]
        assert [(field.name, field.type) for field in listed[op].field_names] == [
            (name, trt.PluginFieldType.INT32) for name in schema.ATTRIBUTES
        ]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("version", ["2", "99", ""])
def test_registry_has_no_other_version(registry, op, version):
    """What TensorRT's parser asks for by a node's plugin_version, and then says is not there."""
    assert registry.get_creator(op, str(schema.VERSION), "") is not None
    assert registry.get_creator(op, version, "") is None


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("phase, fields", [("BUILD", BUILD_FIELDS), ("RUNTIME", ENGINE_FIELDS)])
def test_plugin_is_created(registry, op, phase, fields):
    plugin = create(registry, op, fields, getattr(trt.TensorRTPhase, phase))
    core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
    assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == (op, str(schema.VERSION), "")
    for capability in (trt.PluginCapabilityType.BUILD, trt.PluginCapabilityType.RUNTIME):
        assert plugin.get_capability_interface(capability) is not None


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "phase, fields, message",
    [
        ("BUILD", {"num_heads": 8}, "the field num_points (one int32) is missing"),
        ("BUILD", BUILD_FIELDS | {"num_heads": 0}, "num_heads is 0; it must be at least 1"),
        ("BUILD", BUILD_FIELDS | {"num_points": 9}, "num_points is 9; the kernels take at most 8"),
        (
            "BUILD",
            BUILD_FIELDS | {"num_points": np.array([4.0], np.float32)},
            "the field num_points has the TensorRT type 1 and 1 values; it should be one kINT32 (5)",
        ),
        ("RUNTIME", BUILD_FIELDS, "the field serialization_version (one int32) is missing"),
        (
            "RUNTIME",
            ENGINE_FIELDS | {"serialization_version": 2},
            "the field serialization_version is 2; this library reads 1: build the engine again",
        ),
    ],
)
def test_bad_fields_are_refused(registry, capfd, op, phase, fields, message):
    assert create(registry, op, fields, getattr(trt.TensorRTPhase, phase)) is None
    # TensorRT has no logger before there is a builder or a runtime, so the message goes to stderr.
    assert f"{op}: {message}\n" in capfd.readouterr().err


# What Triton, DeepStream and a loader's environment do with a library, in a process of its own.
OPEN = "ctypes.CDLL({register!r}); "
IMPORT = "import tensorrt_lean; registry = tensorrt_lean.get_plugin_registry(); "
PRINT = "print(sorted(c.name for c in registry.all_creators if c.name in {ops!r}))"


@pytest.mark.parametrize(
    "program, preload, registered",
    [
        (IMPORT + OPEN + OPEN, "", True),
        (OPEN + IMPORT, "", False),  # TensorRT was not there yet
        (IMPORT, "{register}", False),
        (IMPORT, "{register}:{runtime}", True),
        (IMPORT, "{runtime}:{register}", True),
        (IMPORT + "registry.load_library({plugins!r}); " + OPEN, "", True),
        (IMPORT + OPEN + "assert registry.load_library({plugins!r}) is None; ", "", True),
    ],
)
def test_opened_library_registers_once(library, program, preload, registered):
    register = find("tensorrt-register")
    folder = Path(importlib.util.find_spec("tensorrt_lean_libs").submodule_search_locations[0])
    names = {"register": register, "plugins": library, "ops": OPS, "runtime": folder / "libnvinfer_lean.so.11"}
    result = subprocess.run(
        [sys.executable, "-c", "import ctypes; " + (program + PRINT).format(**names)],
        env=os.environ | {"LD_PRELOAD": preload.format(**names)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == str(sorted(OPS) if registered else [])
    assert "liblitedetr" not in result.stderr


def test_opened_library_says_what_is_missing(tmp_path):
    register = shutil.copy(find("tensorrt-register"), tmp_path)
    program = f"import ctypes; {IMPORT}ctypes.CDLL({register!r})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr.startswith("liblitedetr_tensorrt_register.so: the plugins are not registered: ")
    assert f"{tmp_path}/liblitedetr_tensorrt.so" in result.stderr


@pytest.mark.parametrize(
    "name, exported", [("tensorrt", ["getCreators", "setLoggerFinder"]), ("tensorrt-register", [])]
)
def test_library_exports_its_entry_points_alone(name, exported):
    library = find(name)
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in listed.stdout.splitlines()] == exported


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-register"])
def test_library_needs_nothing_of_tensorrt_or_cuda(name):
    library = find(name)
    listed = subprocess.run(["readelf", "--dynamic", library], capture_output=True, text=True, check=True)
    needed = [line for line in listed.stdout.splitlines() if "(NEEDED)" in line]
    assert needed and not any(name in line for line in needed for name in ("nvinfer", "cuda", "cudart"))
