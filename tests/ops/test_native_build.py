"""What the build says where ONNX Runtime's headers, or OpenVINO, are not to be found."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "get_onnxruntime_headers.sh"
# What CMake and the script need, and no package manager.
PROGRAMS = [
    "cmake",
    "c++",
    "g++",
    "gcc",
    "cc",
    "ld",
    "as",
    "ar",
    "ranlib",
    "make",
    "sh",
    "bash",
    "uname",
    "env",
    "find",
    "mktemp",
    "rm",
    "mkdir",
    "dirname",
    "basename",
]


def configure(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess:
    programs = folder / "bin"
    programs.mkdir()
    for name in PROGRAMS:
        if (found := shutil.which(name)) is not None:
            (programs / name).symlink_to(found)
    command = ["cmake", "-S", ROOT, "-B", folder / "build", "-DCMAKE_CUDA_COMPILER=NOTFOUND", *options]
    environment = {key: value for key, value in os.environ.items() if key != "ORT_INCLUDE_DIR"}
    environment |= {"PATH": str(programs), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("make"), reason="CMake or make is not installed")
class TestConfigure:
    def test_fails_without_headers_and_names_three_remedies(self, tmp_path):
        # Headers that the system has would be found.
        result = configure(tmp_path, "-DCMAKE_FIND_ROOT_PATH=/nowhere", "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY")
        assert result.returncode != 0
        message = " ".join(result.stderr.split())
        assert "onnxruntime_c_api.h (1.18 or newer) was not found" in message
        assert "set the environment variable ORT_INCLUDE_DIR" in message
        assert "-C cmake.define.ORT_INCLUDE_DIR=FOLDER" in message
        assert "libonnxruntime-dev (Debian 13, Ubuntu) or onnxruntime-devel (Fedora)" in message
        assert "-C cmake.define.LITEDETR_ONNXRUNTIME=OFF" in message

    def test_goes_on_without_the_ops_where_told_to(self, tmp_path):
        result = configure(tmp_path, "-DLITEDETR_ONNXRUNTIME=OFF")
        assert result.returncode == 0, result.stderr
        assert "The ONNX Runtime custom ops are left out: LITEDETR_ONNXRUNTIME is OFF" in result.stdout

    def test_takes_the_environments_headers(self, tmp_path):
        (tmp_path / "include").mkdir()
        (tmp_path / "include" / "onnxruntime_c_api.h").touch()
        result = configure(tmp_path, ORT_INCLUDE_DIR=str(tmp_path))
        assert result.returncode == 0, result.stderr
        assert f"ONNX Runtime headers: {tmp_path}/include" in result.stdout

    def test_folder_without_headers_in_the_environment(self, tmp_path):
        result = configure(tmp_path, ORT_INCLUDE_DIR="/nowhere")
        assert result.returncode != 0
        assert "ORT_INCLUDE_DIR is /nowhere, where there is no onnxruntime_c_api.h" in " ".join(result.stderr.split())

    def test_goes_on_without_openvino(self, tmp_path):
        result = configure(tmp_path, "-DLITEDETR_ONNXRUNTIME=OFF", OpenVINO_DIR="/nowhere")
        assert result.returncode == 0, result.stderr
        assert "The OpenVINO extension is left out: OpenVINO was not found" in result.stdout

    def test_fails_without_openvino_where_told_to(self, tmp_path):
        options = ("-DLITEDETR_ONNXRUNTIME=OFF", "-DLITEDETR_OPENVINO=ON")
        result = configure(tmp_path, *options, OpenVINO_DIR="/nowhere")
        assert result.returncode != 0
        message = " ".join(result.stderr.split())
        assert "The OpenVINO extension cannot be built: OpenVINO was not found" in message
        assert "set the environment variable OpenVINO_DIR" in message and "--no-build-isolation" in message


def test_script_uses_what_it_has_downloaded(tmp_path):
    (tmp_path / "usr").mkdir()
    (tmp_path / "usr" / "onnxruntime_c_api.h").touch()
    environment = {key: value for key, value in os.environ.items() if key != "ORT_INCLUDE_DIR"}
    result = subprocess.run([SCRIPT, tmp_path], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == f"{tmp_path}/usr\n"
