"""Finding the compiled libraries, and what importing the package loads."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from litedetr_deploy.ops import native


def test_core_answers_with_an_instruction_set_of_this_machine():
    machine = platform.machine()
    wanted = {"x86_64": {"avx512", "avx2", "generic"}, "aarch64": {"neon"}}.get(machine, {"generic"})
    cpu = Path("/proc/cpuinfo").read_text() if machine == "x86_64" else ""
    if "avx2" in cpu and "f16c" in cpu and "fma" in cpu:
        wanted = {"avx512", "avx2"} if "avx512bw" in cpu else {"avx2"}
    assert native.load_core().kda_cpu_isa().decode() in wanted


def test_other_abi_version(monkeypatch):
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    with pytest.raises(RuntimeError, match="has ABI version 2 and this package needs 3: install the package again"):
        native.load_core.__wrapped__()


def test_library_from_the_environment(monkeypatch, tmp_path):
    library = tmp_path / native.LIBRARIES["tensorrt"]
    library.touch()
    monkeypatch.setenv(native.PATH_VARIABLE, f"/nowhere:{tmp_path}")
    assert native.library("tensorrt") == library


def test_missing_library(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_folders", lambda: [tmp_path])
    with pytest.raises(FileNotFoundError, match=rf"liblitedetr_onnxruntime.so .* is not in {tmp_path}\..*`pip install"):
        native.library("onnxruntime")


def test_unknown_library():
    names = "'core', 'deepstream', 'onnxruntime', 'openvino', 'tensorrt', 'tensorrt-register'"
    with pytest.raises(ValueError, match=f"no library 'ort'; the libraries are {names}"):
        native.library("ort")


@pytest.mark.parametrize("statement", ["import litedetr_deploy.ops", "import litedetr_deploy.ops.native"])
def test_import_loads_neither_torch_nor_onnx(statement):
    program = f"import sys; {statement}; print([m for m in ('torch', 'onnx', 'onnxscript') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_reference_is_an_attribute():
    import litedetr_deploy as ld

    assert callable(ld.ops.reference.key_aware_deform_attn)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ld.ops.nothing
