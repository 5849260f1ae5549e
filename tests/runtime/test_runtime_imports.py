"""The run-time package stays light: what it imports is checked in a fresh interpreter."""

import subprocess
import sys

BLOCK = "import sys; sys.modules.update(dict.fromkeys({blocked!r})); "


def run(blocked, code):
    done = subprocess.run([sys.executable, "-c", BLOCK.format(blocked=blocked) + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_imports_with_numpy_alone():
    run(["torch", "onnx", "onnxruntime", "PIL", "rich", "typer"], "import litedetr_deploy; litedetr_deploy.native")


def test_the_runtime_imports_without_torch_onnx_and_onnxruntime():
    run(
        ["torch", "onnx", "onnxruntime"],
        "import litedetr_deploy as ld; ld.Detector; ld.create_session; "
        "from litedetr_deploy.runtime import draw, environment, postprocess",
    )


def test_predicting_imports_neither_torch_nor_onnx(tmp_path):
    from .tiny_artifact import save_detector

    model = save_detector(tmp_path / "model.onnx")
    run(
        ["torch", "onnx"],
        f"import numpy, litedetr_deploy as ld; ld.Detector({str(model)!r}).predict(numpy.zeros((9, 9, 3), 'uint8'))",
    )
