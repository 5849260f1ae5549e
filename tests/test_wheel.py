"""The wheel, installed where there is no compiler."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import litedetr_deploy as ld
from litedetr_deploy.assets.shapes import SIZE

ROOT = Path(__file__).parents[1]
pytest.importorskip("auditwheel", reason="auditwheel is not installed")


def run(*command, **options):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_clean_environment_without_compilers_predicts(tmp_path):
    printed = run(sys.executable, ROOT / "tools" / "build_wheel.py", tmp_path / "wheel")
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert wheel.name.startswith(f"litedetr_deploy-{ld.__version__}-py3-none-manylinux_2_28_")
    assert "liblitedetr_onnxruntime.so" in printed
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "test" in name]

    ld.export_onnx(ld.load_model("lite-dino-shapes"), tmp_path / "model.onnx", image_size=(SIZE, SIZE), verify=False)
    clean = tmp_path / "clean"
    run(sys.executable, "-m", "venv", clean)
    # Where pip finds packages is this user's and machine's to say.
    alone = {name: value for name, value in os.environ.items() if name == "HOME" or name.startswith("PIP_")}
    alone["PATH"] = str(clean / "bin")
    run(clean / "bin" / "pip", "install", "--only-binary", ":all:", f"{wheel}[onnxruntime]", env=alone, cwd=tmp_path)
    scene = ROOT / "docs" / "scene.png"
    arguments = "predict", "model.onnx", scene, "-o", "found.png"
    theirs = run(clean / "bin" / "litedetr", *arguments, env=alone, cwd=tmp_path)
    ours = run(Path(sys.executable).parent / "litedetr", *arguments, cwd=tmp_path)
    assert theirs.split(" (")[0] == ours.split(" (")[0]
    assert " objects: " in theirs
    script = "import litedetr_deploy; print(litedetr_deploy.__file__)"
    assert run(clean / "bin" / "python", "-c", script, env=alone, cwd=tmp_path).startswith(f"{clean}/")
