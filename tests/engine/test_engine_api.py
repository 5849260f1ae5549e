"""What differs between versions of TensorRT, against stand-ins for their modules."""

import sys
import types
from pathlib import Path

import pytest

import litedetr_deploy as ld
from litedetr_deploy.engine import api
from litedetr_deploy.runtime import cuda

from ..runtime.test_runtime_imports import run


def module(version, **names):
    return types.SimpleNamespace(__version__=version, **names)


def flags(version, backend="tensorrt", **names):
    return api._network_flags(module(version, **names), backend)


def test_strong_typing_is_a_flag_until_tensorrt_11():
    flag = types.SimpleNamespace(STRONGLY_TYPED=1)
    assert flags("10.3.0", NetworkDefinitionCreationFlag=flag) == 0b10
    assert flags("10.16.1.11", NetworkDefinitionCreationFlag=flag) == 0b10
    assert flags("11.0.0") == flags("11.4.0.106") == 0
    assert flags("1.7.1.116", "tensorrt-rtx", NetworkDefinitionCreationFlag=flag) == 0b10


def test_hardware_compatibility_that_the_version_lacks():
    builder = api.Builder.__new__(api.Builder)
    builder.backend, builder.version = "tensorrt", "10.7.0"
    levels = {"NONE": 0, "AMPERE_PLUS": 1}
    builder.trt = module("10.7.0", HardwareCompatibilityLevel=types.SimpleNamespace(__members__=levels))
    builder.check(api.Options(hardware_compatibility="ampere+"))
    with pytest.raises(ld.LiteDetrError, match="TensorRT 10.7.0 does not have it. Choose 'ampere\\+'"):
        builder.check(api.Options(hardware_compatibility="same-compute-capability"))


def test_tensorrt_needs_the_gpu(monkeypatch, no_gpu):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", module("10.7.0"))
    with pytest.raises(ld.LiteDetrError, match="on the GPU that it is for: no GPU here.*'tensorrt-rtx'"):
        api.Builder("tensorrt")


def test_tensorrt_takes_no_compute_capabilities():
    with pytest.raises(ld.LiteDetrError, match="compute_capabilities is 8.6.*choose backend 'tensorrt-rtx'"):
        api.Options(("8.6",)).check("tensorrt")


def test_module_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(ld.LiteDetrError, match=r"pip install litedetr-deploy\[tensorrt-rtx\]"):
        api.Builder("tensorrt-rtx")


def test_a_folder_is_not_the_module(monkeypatch, tmp_path):
    (tmp_path / "tensorrt_rtx").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for path in [path for path in sys.path if Path(path, "tensorrt_rtx", "__init__.py").exists()]:
        monkeypatch.setattr(sys, "path", [other for other in sys.path if other != path])
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # what the import leaves is taken away again
    monkeypatch.delitem(sys.modules, "tensorrt_rtx")
    with pytest.raises(ld.LiteDetrError, match=r"is a folder of that name, and no package.*pip install"):
        api.Builder("tensorrt-rtx")


@pytest.fixture
def tensorrt(monkeypatch, tmp_path):
    """A stand-in for TensorRT 10.15 with a timing cache; returns the configuration that a builder makes of options."""
    calls = {}

    class Config:
        def clear_flag(self, flag):
            calls["cleared"] = flag

        def set_flag(self, flag):
            calls["flag"] = flag

        def create_timing_cache(self, blob):
            return blob

        def set_timing_cache(self, cache, ignore_mismatch):
            calls["timing cache"] = cache
            return cache != b"of another GPU" and not ignore_mismatch

        def add_optimization_profile(self, profile):
            calls["profile"] = profile.shapes

    class Profile:
        def __init__(self):
            self.shapes = {}

        def set_shape(self, name, *shapes):
            self.shapes[name] = shapes

    builder = api.Builder.__new__(api.Builder)
    builder.backend, builder.version, builder.plugins = "tensorrt", "10.15.0", tmp_path / "plugins.so"
    builder.trt = module(
        "10.15.0",
        ProfilingVerbosity=types.SimpleNamespace(DETAILED="detailed"),
        BuilderFlag=types.SimpleNamespace(TF32="tf32", VERSION_COMPATIBLE="version compatible"),
        HardwareCompatibilityLevel=types.SimpleNamespace(__members__={"NONE": 0, "AMPERE_PLUS": 1}),
    )
    builder._builder = types.SimpleNamespace(create_builder_config=Config, create_optimization_profile=Profile)
    return lambda **options: (builder._configure({"images": ["a", "b", "c"]}, api.Options(**options)), calls)


def test_configuration(tensorrt, tmp_path):
    config, calls = tensorrt(version_compatible=True, hardware_compatibility="ampere+")
    assert calls == {"cleared": "tf32", "flag": "version compatible", "profile": {"images": ("a", "b", "c")}}
    assert config.plugins_to_serialize == [str(tmp_path / "plugins.so")]
    assert config.hardware_compatibility_level == 1 and config.profiling_verbosity == "detailed"
    _, calls = tensorrt(tf32=True, timing_cache=tmp_path / "cache")
    assert calls["timing cache"] == b""


def test_timing_cache(tensorrt, tmp_path):
    (tmp_path / "cache").write_bytes(b"measured")
    assert tensorrt(timing_cache=tmp_path / "cache")[1]["timing cache"] == b"measured"
    (tmp_path / "cache").write_bytes(b"of another GPU")
    with pytest.raises(ld.LiteDetrError, match="cannot use the timing cache .*of another version or GPU"):
        tensorrt(timing_cache=tmp_path / "cache")


def test_progress_counts_steps_within_steps():
    progress = api.Progress()
    progress.start("build", None, 2)
    progress.start("optimise", "build", 4)
    assert [progress.step("optimise", i) for i in range(4)] == [1 / 8, 2 / 8, 3 / 8, 4 / 8]
    progress.finish("optimise")
    assert progress.step("build", 0) == 0.5
    progress.start("optimise", "build", 4)
    assert progress.step("optimise", 1) == 0.75
    assert progress.step("unknown", 9) == 0.75
    assert progress.step("build", 1) == 1


LAYERS_10 = [
    {
        "Name": "conv",
        "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}],
        "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP16 format"}],
        "Weights": {"Type": "Half"},
    },
    {"Name": "half_named", "Inputs": [{"Name": "half", "Format/Datatype": "Float"}], "Outputs": []},
    {"Name": "quantized", "Inputs": [{"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format."}]},
]
LAYERS_11 = [
    {
        "Name": "conv",
        "Inputs": [{"Name": "x", "DataType": "Float", "Format": "N/A"}],
        "Outputs": [{"Name": "y", "DataType": "Half"}],
    },
    {"Name": "gemm", "Inputs": [{"DataType": "BFloat16"}], "Outputs": [{"DataType": "BF16"}]},
    {"Name": "quantized", "Inputs": [{"DataType": "Int8"}], "Outputs": [{"DataType": "Half"}]},
]


@pytest.mark.parametrize(
    "layers, counts",
    [
        (LAYERS_10, {"fp16": 1, "bf16": 0, "int8": 1}),
        (LAYERS_11, {"fp16": 2, "bf16": 1, "int8": 1}),
        (["conv + relu"], {"fp16": 0, "bf16": 0, "int8": 0}),
    ],
)
def test_layer_types(layers, counts):
    assert api.count_layer_types(layers) == counts


def test_errors_of_the_work_reach_the_caller():
    def fail():
        raise cuda.OutOfMemory("full")

    with pytest.raises(cuda.OutOfMemory, match="full"):
        api._interruptible(fail)
    assert api._interruptible(lambda: 7) == 7


def test_importing_needs_no_torch_onnx_or_tensorrt():
    run(
        ["torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"],
        "import litedetr_deploy as ld; ld.build_engine; from litedetr_deploy.runtime import tensorrt",
    )
