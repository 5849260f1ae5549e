"""Finding the compiled libraries, and what importing the package loads."""

import ctypes
import subprocess
import sys

import pytest

from litedetr_deploy.ops import native


def test_core_has_the_structure_that_the_header_declares(tmp_path):
    assert native.load_core().kda_cpu_isa().decode() in ("avx512", "avx2", "neon", "generic")
    # int64 x 3, int32 x 8, pointers x 7, with no padding between
    assert ctypes.sizeof(native.Arguments) == 3 * 8 + 8 * 4 + 7 * 8


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
    with pytest.raises(ValueError, match="no library 'ort'; the libraries are 'core', 'onnxruntime', 'tensorrt'"):
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
