"""The TensorRT session on stand-ins for TensorRT and for the GPU; what loads an engine, on TensorRT-RTX itself."""

import json
import sys
import types

import numpy as np
import pytest

import litedetr_deploy as ld
from litedetr_deploy.errors import Notice
from litedetr_deploy.ops import native
from litedetr_deploy.runtime import cuda, tensorrt
from litedetr_deploy.runtime.session import open_session

from .tiny_artifact import METADATA

GPU = cuda.Gpu("Test GPU", "8.6")
LOW, HIGH = (
    {"images": (1, 3, 64, 96), "orig_target_sizes": (1, 2)},
    {"images": (4, 3, 64, 128), "orig_target_sizes": (4, 2)},
)
OUTPUTS = {"labels": (np.int64, (3,)), "boxes": (np.float32, (3, 4)), "scores": (np.float32, (3,))}
TYPES = {"images": np.float32, "orig_target_sizes": np.int64} | {name: dtype for name, (dtype, _) in OUTPUTS.items()}


class Device:
    """The GPU's memory as arrays of the host, by address."""

    def __init__(self, free=1 << 24):
        self.stream, self.memory, self.free, self.launches, self.destroyed = 77, {}, free, 0, 0

    def allocate(self, size):
        self.free -= size
        if self.free < 0:
            raise cuda.OutOfMemory("the GPU has too little memory left")
        address = 1000 * (len(self.memory) + 1)
        self.memory[address] = np.zeros(size, np.uint8)
        return address

    def allocate_host(self, size):
        return np.zeros(size, np.uint8)

    def to_device(self, address, array):
        self.memory[address][: array.nbytes] = array.reshape(-1).view(np.uint8)

    def to_host(self, array, address):
        array.reshape(-1).view(np.uint8)[:] = self.memory[address][: array.nbytes]

    def synchronize(self):
        pass

    def capture(self, enqueue):
        return enqueue

    def launch(self, graph):
        self.launches += 1
        graph()

    def destroy(self, graph):
        self.destroyed += 1

    def close(self):
        self.memory.clear()


class Context:
    """Gives for every image the mean of its pixels as scores, and its size as boxes."""

    def __init__(self, engine):
        self.engine, self.shapes, self.addresses = engine, {}, {}
        engine.contexts.append(self)

    def set_device_memory(self, address, size):
        assert len(self.engine.device.memory[address]) >= size

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name):
        return self.shapes.get(name) or (self.shapes["images"][0], *OUTPUTS[name][1])

    def read(self, name):
        shape, memory = self.get_tensor_shape(name), self.engine.device.memory[self.addresses[name]]
        return memory[: int(np.prod(shape)) * np.dtype(TYPES[name]).itemsize].view(TYPES[name]).reshape(shape)

    def execute_async_v3(self, stream):
        assert stream == self.engine.device.stream
        if self.engine.broken:
            self.engine.logger.log("error", "an illegal memory access")
            return False
        self.read("scores")[...] = self.read("images").mean((1, 2, 3))[:, None]
        self.read("boxes")[...] = np.tile(self.read("orig_target_sizes"), 2)[:, None]
        self.read("labels")[...] = 5
        return True


class Engine:
    num_io_tensors, device_memory_size_v2 = 5, 4096

    def __init__(self):
        self.contexts, self.broken, self.device, self.logger, self.no_context = [], False, None, None, False

    def get_tensor_name(self, i):
        return list(TYPES)[i]

    def get_tensor_mode(self, name):
        return "input" if name in LOW else "output"

    def get_tensor_dtype(self, name):
        return TYPES[name]

    def get_tensor_shape(self, name):
        return (-1, *OUTPUTS[name][1])

    def get_tensor_profile_shape(self, name, profile):
        return [LOW[name], LOW[name], HIGH[name]]

    def create_execution_context(self, strategy):
        assert strategy == "user managed"
        return None if self.no_context else Context(self)


class Logger:
    ERROR, INTERNAL_ERROR, WARNING = "error", "internal error", "warning"

    def __init__(self):
        pass


class Registry:
    def __init__(self, loads=True):
        self.loads, self.loaded = loads, []

    def get_creator(self, name, version, namespace):
        return self.loaded or None

    def load_library(self, path):
        self.loaded.append(path)
        return object() if self.loads else None


@pytest.fixture
def trt(monkeypatch):
    """A stand-in for the module `tensorrt` whose runtime gives `trt.engine`, or None and the error `trt.says`."""
    module = types.ModuleType("tensorrt")
    module.__version__ = "10.15.1"
    module.engine, module.says, module.registry, module.device = Engine(), "", Registry(), Device()

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger):
            self.logger = logger

        def get_plugin_registry(self):
            return module.registry

        def deserialize_cuda_engine(self, plan):
            module.host_code, module.engine.device, module.engine.logger = (
                self.engine_host_code_allowed, module.device, self.logger)  # fmt: skip
            if module.says:
                self.logger.log("error", module.says)
                return None
            return module.engine

    module.ILogger, module.Runtime, module.nptype = Logger, Runtime, lambda dtype: dtype
    module.TensorIOMode = types.SimpleNamespace(INPUT="input")
    module.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user managed")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(cuda, "find_gpu", lambda: GPU)
    monkeypatch.setattr(cuda, "Device", lambda: module.device)
    monkeypatch.setattr(native, "library", lambda name: native.Path(f"/lib/{native.LIBRARIES[name]}"))
    return module


@pytest.fixture
def plan(tmp_path):
    """Write an engine and its record; returns its path."""

    def write(**record):
        path = tmp_path / "model.plan"
        path.write_bytes(b"ftrt, an engine")
        record = {
            "backend": "tensorrt",
            "version": "10.15.1",
            "metadata": METADATA,
            "compute_capabilities": ["8.6"],
            "sha256": tensorrt.sha256(path),
        } | record
        tensorrt.record_path(path).write_text(json.dumps(record))
        return path

    return write


def feed(batch=1, width=96, seed=0):
    images = np.random.default_rng(seed).random((batch, 3, 64, width), np.float32)
    return {"images": images, "orig_target_sizes": np.array([[640, 480]] * batch)}


def check(output, given):
    np.testing.assert_allclose(output["scores"][:, 0], given["images"].mean((1, 2, 3)), rtol=1e-5)
    assert output["boxes"].shape == (len(given["images"]), 3, 4) and (output["boxes"] == [640, 480, 640, 480]).all()
    assert output["labels"].dtype == np.int64


def test_description(trt, plan):
    session = open_session(plan())
    assert session.inputs == {"images": (None, 3, 64, None), "orig_target_sizes": (None, 2)}
    assert session.outputs == ("labels", "boxes", "scores")
    assert session.metadata == METADATA


def test_runs_of_several_shapes(trt, plan):
    session = tensorrt.TensorRTSession(plan())
    first = feed()
    kept = session.run(first)
    for batch, width in ((2, 128), (4, 96), (1, 96), (3, 100)):
        given = feed(batch, width, seed=batch)
        check(session.run(given), given)
    check(kept, first)  # later runs did not write into it


def test_graph_from_the_second_run_on(trt, plan):
    session = tensorrt.TensorRTSession(plan())
    launches = []
    for seed, batch in enumerate((1, 2, 1, 2, 1)):
        given = feed(batch, seed=seed)
        check(session.run(given), given)
        launches.append(trt.device.launches)
    assert launches == [0, 0, 1, 2, 3]


def test_work_that_cannot_be_captured(trt, plan):
    trt.device.capture = lambda enqueue: None
    session = tensorrt.TensorRTSession(plan())
    for seed in range(3):
        given = feed(seed=seed)
        check(session.run(given), given)
    assert trt.device.launches == 0


def test_few_contexts_are_kept(trt, plan):
    session = tensorrt.TensorRTSession(plan())
    widths = range(96, 96 + tensorrt.CONTEXTS + 1)
    for width in (96, 96, *widths):
        session.run(feed(width=width))
    before = len(trt.engine.contexts)
    assert trt.device.destroyed == 1  # the graph of width 96
    session.run(feed(width=widths[-1]))
    assert len(trt.engine.contexts) == before
    session.run(feed(width=96))
    assert len(trt.engine.contexts) == before + 1


def test_detector_takes_an_engine(trt, plan, monkeypatch):
    monkeypatch.setitem(HIGH, "images", (4, 3, 64, 96))
    detector = ld.Detector(plan())
    assert detector.image_size == (64, 96) and not detector.takes_mask
    [found] = detector.predict(np.full((30, 40, 3), 255, np.uint8))
    assert found.names == ["thing 5"] * 3 and (found.boxes == [40, 30, 40, 30]).all()
    np.testing.assert_allclose(found.scores, 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": None}, "the input 'images' of .*model.plan is missing; given: orig_target_sizes"),
        ({"images": np.zeros((1, 3, 64, 96))}, "'images' is float64; .* takes float32"),
        (
            {"images": np.zeros((5, 3, 64, 96), np.float32)},
            r"\[5, 3, 64, 96\]; .* \[1, 3, 64, 96\] to \[4, 3, 64, 128\]",
        ),
        ({"images": np.zeros((1, 3, 64, 95), np.float32)}, "--batch and --image-size"),
        ({"images": np.zeros((3, 64, 96), np.float32)}, r"\[3, 64, 96\]"),
    ],
)
def test_inputs_that_do_not_fit(trt, plan, change, message):
    given = {name: value for name, value in (feed() | change).items() if value is not None}
    with pytest.raises(ld.LiteDetrError, match=message):
        tensorrt.TensorRTSession(plan()).run(given)


def test_failures_of_the_gpu(trt, plan):
    session = tensorrt.TensorRTSession(plan())
    trt.engine.broken = True
    with pytest.raises(ld.LiteDetrError, match="model.plan fails to run: an illegal memory access"):
        session.run(feed())
    trt.engine.no_context = True
    with pytest.raises(ld.LiteDetrError, match="model.plan cannot be prepared"):
        tensorrt.TensorRTSession(plan())
    trt.engine.no_context, trt.device.free = False, 5000
    with pytest.raises(ld.LiteDetrError, match="model.plan cannot be prepared: the GPU has too little memory"):
        tensorrt.TensorRTSession(plan())


@pytest.mark.parametrize(
    "metadata, record, loaded",
    [
        ({"attention": "op"}, {}, True),
        ({"attention": "op"}, {"plugin_inside": True, "options": {"version_compatible": True}}, False),
        ({"attention": "gather"}, {}, False),
    ],
)
def test_plugins(trt, plan, metadata, record, loaded):
    tensorrt.TensorRTSession(plan(metadata=METADATA | metadata, **record))
    assert trt.registry.loaded == (["/lib/liblitedetr_tensorrt.so"] if loaded else [])
    assert trt.host_code == bool(record)


def test_an_engine_of_trtexec_has_no_record(trt, plan):
    path = plan()
    tensorrt.record_path(path).unlink()
    session = tensorrt.TensorRTSession(path)
    assert session.metadata == {} and trt.registry.loaded == ["/lib/liblitedetr_tensorrt.so"]


def test_plugin_library_that_is_missing_or_does_not_load(trt, plan, monkeypatch):
    path = plan(metadata=METADATA | {"attention": "op"})
    trt.registry.loads = False
    with pytest.raises(ld.LiteDetrError, match="cannot load the plugin library /lib/liblitedetr_tensorrt.so"):
        tensorrt.TensorRTSession(path)

    def missing(name):
        raise FileNotFoundError(f"The library {name} was not built. Build it.")

    monkeypatch.setattr(native, "library", missing)
    trt.registry.loaded.clear()
    with pytest.raises(ld.LiteDetrError, match="The library tensorrt was not built"):
        tensorrt.TensorRTSession(path)
    tensorrt.record_path(path).unlink()
    tensorrt.TensorRTSession(path)  # perhaps it needs none


def test_op_of_another_version(trt, plan):
    with pytest.raises(ld.LiteDetrError, match="version 7 of the attention ops; this package has version 1"):
        tensorrt.TensorRTSession(plan(metadata=METADATA | {"attention": "op", "op_version": 7}))


# What TensorRT 10 and 11 log.
@pytest.mark.parametrize(
    "says, record, message",
    [
        (
            "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does not match. Note: "
            "Current Version: 240, Serialized Engine Version: 239",
            {"version": "10.7.0"},
            "built by tensorrt 10.7.0, and 10.15.1 is installed.*--version-compatible",
        ),
        (
            "The engine plan file is not compatible with this version of TensorRT, expecting library version 10.15.1 "
            "got 10.3.0",
            {},
            "an engine runs in the version that built it",
        ),
        ("", {"version": "11.1.0"}, "built by tensorrt 11.1.0"),
        (
            "The engine plan file is generated on an incompatible device, expecting compute 8.6 got compute 8.9, "
            "please rebuild.",
            {"compute_capabilities": ["8.9"]},
            "built for compute capability 8.9, and Test GPU has 8.6",
        ),
        ("failed", {"compute_capabilities": ["8.0", "9.0"]}, "built for compute capability 8.0 and 9.0, and Test GPU"),
        (
            "getPluginCreator could not find plugin KeyAwareDeformAttn version 1",
            {},
            "needs a plugin that TensorRT does not "
            "have: KeyAwareDeformAttn and MSDeformAttn are in .*liblitedetr_tensorrt.so",
        ),
        (
            "KeyAwareDeformAttn: the field serialization_version is 2; this library reads 1: build the engine again",
            {},
            "plugins of another version",
        ),
        (
            "Requested amount of GPU memory (1073741824 bytes) could not be allocated: out of memory",
            {},
            "does not fit into the memory of Test GPU",
        ),
        (
            "Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed.Trying to load an engine created "
            "with incompatible serialization version",
            {},
            "not an engine of tensorrt, or a damaged one",
        ),
        ("Assertion failed", {}, "not an engine of tensorrt, or a damaged one. TensorRT says: Assertion failed"),
    ],
)
def test_engines_that_cannot_be_loaded(trt, plan, says, record, message):
    trt.says = says or " "
    with pytest.raises(ld.LiteDetrError, match=message):
        tensorrt.TensorRTSession(plan(**record))


def test_damaged_or_replaced(trt, plan):
    path = plan()
    path.write_bytes(b"another engine")
    with pytest.raises(ld.LiteDetrError, match=r"not the engine that model\.plan\.json describes.*copy both"):
        tensorrt.TensorRTSession(path)
    for text in ("{", "[]", "{}", "[" * 100_000, '{"sha256": "", "metadata": 7}'):
        tensorrt.record_path(path).write_text(text)
        with pytest.raises(ld.LiteDetrError, match=r"model\.plan\.json, which describes .* cannot be read"):
            tensorrt.TensorRTSession(path)


@pytest.mark.parametrize(
    "contents, message",
    [
        (b"", r"model\.plan is empty"),
        (b"garbage", r"model\.plan is not a TensorRT engine: it begins with b'garb', and model\.plan\.json"),
        (b"ftrt, an engine", r"model\.plan has no model\.plan\.json beside it.*Copy that file as well.*pip install"),
    ],
)
def test_what_is_wrong_with_the_file_comes_before_tensorrt(monkeypatch, tmp_path, contents, message):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    (tmp_path / "model.plan").write_bytes(contents)
    with pytest.raises(ld.LiteDetrError, match=message):
        open_session(tmp_path / "model.plan")


def test_metadata_that_contradicts_the_engine(trt, plan):
    with pytest.raises(ld.LiteDetrError, match="contradicts its graph: its pixel_mask is True"):
        open_session(plan(metadata=METADATA | {"pixel_mask": True}))
    # An engine can have fewer sizes than the model that it was built from.
    assert open_session(plan(metadata=METADATA | {"image_size": None, "pixel_mask": False})).outputs


def test_an_engine_that_failed_its_verification_runs_with_a_notice(trt, plan, monkeypatch):
    monkeypatch.setitem(HIGH, "images", (4, 3, 64, 96))
    verification = {"verdict": "failed", "why": "boxes are 300 pixels off"}
    with pytest.warns(Notice, match=r"model\.plan failed its verification \(boxes are 300 pixels off\)"):
        ld.Detector(plan(metadata=METADATA | {"verification": verification}))
    path = plan()
    tensorrt.record_path(path).unlink()
    with pytest.warns(Notice, match=r"model\.plan was not made by this package"):
        ld.Detector(path)


def test_a_batch_of_0(trt, plan):
    given = {"images": np.zeros((0, 3, 64, 96), np.float32), "orig_target_sizes": np.zeros((0, 2), np.int64)}
    output = open_session(plan()).run(given)
    assert {name: value.shape for name, value in output.items()} == {
        "labels": (0, 3), "boxes": (0, 3, 4), "scores": (0, 3),
    }  # fmt: skip


def test_missing_things(trt, plan, monkeypatch, tmp_path):
    with pytest.raises(ld.LiteDetrError, match="gone.plan does not exist. Give the path of a TensorRT engine"):
        ld.Detector(tmp_path / "gone.plan")

    def no_gpu():
        raise ld.LiteDetrError("no GPU here")

    monkeypatch.setattr(cuda, "find_gpu", no_gpu)
    with pytest.raises(ld.LiteDetrError, match="no GPU here"):
        open_session(plan())
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ld.LiteDetrError, match=r"pip install litedetr-deploy\[tensorrt\]"):
        open_session(plan())


def test_rtx_itself_refuses_what_is_no_engine(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")
    path = tmp_path / "model.engine"
    path.write_bytes(b"no engine at all" * 100)
    logger = tensorrt.message_logger(trt)
    with pytest.raises(ld.LiteDetrError, match="not an engine of tensorrt_rtx, or a damaged one.*says: .*agic"):
        tensorrt.deserialize(trt, trt.Runtime(logger), logger, path, {}, GPU)


def test_cuda_bindings():
    """Without a driver the bindings say so; with one they describe the GPU."""
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    try:
        gpu = cuda.find_gpu()
    except ld.LiteDetrError as error:
        assert "no GPU here (CUDA: " in str(error)
    else:
        assert gpu.name and gpu.compute_capability.count(".") == 1


def test_cuda_bindings_that_are_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ld.LiteDetrError, match=r"pip install litedetr-deploy\[gpu\]"):
        cuda.find_gpu()


def test_plugins_load_into_tensorrts_own_registry():
    trt = pytest.importorskip("tensorrt_lean", reason="tensorrt-lean-cu13 is not installed")
    try:
        library = native.library("tensorrt")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    registry = trt.get_plugin_registry()
    assert tensorrt.load_plugins(registry) == tensorrt.load_plugins(registry) == library
    assert registry.get_creator("KeyAwareDeformAttn", "1", "") is not None


class Runtime:
    """A stand-in for `cuda.bindings.runtime` that notes what is made and what is released."""

    cudaStreamNonBlocking, cudaHostAllocDefault = 1, 0
    cudaError_t = types.SimpleNamespace(
        cudaSuccess=0, cudaErrorMemoryAllocation=2, cudaErrorNoDevice=100, cudaErrorInsufficientDriver=35
    )
    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self):
        self.calls, self.fails = [], {}

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            return self.fails.get(name, 0), len(self.calls)

        call.__name__ = name
        setattr(self, name, call)
        return call

    def cudaGetErrorString(self, error):
        return 0, b"out of memory"


@pytest.fixture
def runtime(monkeypatch):
    stand_in = Runtime()
    monkeypatch.setattr(cuda, "_bindings", lambda: stand_in)
    return stand_in


def test_a_device_gives_everything_back_in_reverse(runtime):
    device = cuda.Device()
    device.allocate(8)
    array = np.zeros(2, np.float32)
    device.to_device(device.allocate(8), array)
    first, second = device.capture(lambda: True), device.capture(lambda: True)
    device.launch(second)
    device.destroy(first)
    runtime.calls.clear()
    device.close()
    assert runtime.calls == [
        "cudaStreamSynchronize", "cudaGraphExecDestroy", "cudaFree", "cudaFree", "cudaStreamDestroy",
    ]  # fmt: skip
    device.close()
    assert len(runtime.calls) == 5


def test_capture_that_fails_and_memory_that_is_short(runtime):
    device = cuda.Device()
    assert device.capture(lambda: False) is None and runtime.calls[-1] == "cudaGetLastError"
    runtime.fails["cudaMalloc"] = 2
    with pytest.raises(cuda.OutOfMemory, match="too little memory left: cudaMalloc.*out of memory"):
        device.allocate(8)
