"""The C++ programs of examples/cpp: the one for ONNX Runtime built and run, the one for TensorRT compiled."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import litedetr_deploy as ld
from litedetr_deploy.assets.shapes import CLASS_NAMES, scene
from litedetr_deploy.ops import schema

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "cpp"
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("cmake") or not shutil.which("c++"), reason="CMake or a C++ compiler is not installed"
    ),
]


def headers(name: str, script: str, folder: Path) -> Path:
    """Return the folder of a header that a build of the plugins has fetched, or fetch it."""
    found = next(ROOT.glob(f"build/*/*-headers/**/{name}"), None)
    if found:
        return found.parent
    command = [*([sys.executable] if script.endswith(".py") else []), ROOT / "tools" / script, folder]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program for ONNX Runtime, linked to the library in its Python package."""
    folder = tmp_path_factory.mktemp("cpp")
    package = Path(onnxruntime.__file__).parent / "capi"
    library = folder / "libonnxruntime.so.1"  # its name for the loader, which the package's file has not
    library.symlink_to(next(package.glob("libonnxruntime.so.1.*")))
    include = headers("onnxruntime_cxx_api.h", "get_onnxruntime_headers.sh", folder / "headers")
    options = [f"-DORT_INCLUDE_DIR={include}", f"-DORT_LIBRARY={library}", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"]
    for command in (["cmake", "-S", FOLDER, "-B", folder, *options], ["cmake", "--build", folder]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder / "detect_onnxruntime"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    ld.export_onnx(ld.load_model("lite-dino-shapes"), path, image_size=(256, 256), verify=False)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Scenes wider and higher than the model's input, and smaller, in both formats."""
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for i, (size, suffix) in enumerate([((320, 480), ".ppm"), ((160, 200), ".ppm"), ((256, 256), ".jpg")]):
        paths.append(folder / f"scene-{i}{suffix}")
        scene(i, 5, size)[0].save(paths[-1], quality=95)
    return paths


def run(program, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_detections_are_those_of_python(program, model, images, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(CLASS_NAMES) + "\n")
    result = run(program, model, *images, "--op-library", ld.native.library("onnxruntime"), "--labels", labels)
    assert (result.returncode, result.stderr) == (0, "")
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    for path, found in zip(images, ld.Detector(model, threads=1).predict(images, threshold=0.3)):
        mine = [row for row in rows if row[0] == str(path)]
        assert len(mine) == len(found) > 0
        assert [row[1] for row in mine] == found.names
        # What is printed is rounded; libjpeg versions may decode to other neighbouring values.
        scores, boxes = (1e-6, 2e-3) if path.suffix == ".ppm" else (2e-2, 1)
        assert np.abs(np.array([row[2] for row in mine], float) - found.scores).max() <= scores + 1e-6
        assert np.abs(np.array([row[3:] for row in mine], float) - found.boxes).max() <= boxes


def damaged(kind: str, folder: Path, model: Path, image: Path) -> list:
    """Arguments of which one thing is wrong."""
    library = ld.native.library("onnxruntime")
    path = folder / kind
    if kind in ("no-model", "no-image"):
        return [path, image] if kind == "no-model" else [model, path, "--op-library", library]
    if kind in ("no-library", "text-library", "another-library"):
        path.write_text("no library")
        wanted = {"no-library": folder / "none.so", "text-library": path}
        return [model, image, "--op-library", wanted.get(kind, ld.native.library("core"))]
    if kind in ("text-model", "text-image"):
        path.write_text("neither")
        return [path, image] if kind == "text-model" else [model, path, "--op-library", library]
    if kind == "cut-image":
        path.write_bytes(image.read_bytes()[:-1000])
        return [model, path, "--op-library", library]
    proto = onnx.load(model)
    if kind == "newer-op":
        for node in proto.graph.node:
            for attribute in node.attribute if node.domain == schema.DOMAIN else ():
                if attribute.name == "plugin_version":
                    attribute.s = str(schema.VERSION + 1).encode()
    elif kind == "other-outputs":
        del proto.graph.output[1:]
    onnx.save(proto, path)
    return [path, image] + (["--op-library", library] if kind != "without-library" else [])


@pytest.mark.parametrize(
    "kind,part",
    [
        ("no-model", "does not exist or cannot be opened: check the path"),
        ("text-model", "cannot be loaded"),
        ("without-library", "It holds the attention op: give --op-library"),
        ("no-library", "cannot be used by ONNX Runtime"),
        ("text-library", "cannot be used by ONNX Runtime"),
        ("another-library", "of the release that exported the model"),
        ("newer-op", "this library has version 1 of the op: export the model again, or install"),
        ("other-outputs", "is no detector that this program runs: it takes images orig_target_sizes and gives"),
        ("no-image", "the image"),
        ("text-image", "is no image that this program reads"),
        ("cut-image", "is incomplete"),
    ],
)
def test_bad_input_is_a_sentence(program, model, images, tmp_path, kind, part):
    result = run(program, *damaged(kind, tmp_path, model, images[0]))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and part in result.stderr, result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    "arguments,part",
    [([], "a model and at least one image are wanted"), (["m", "i", "--threshold", "2"], "--threshold is 2"),
     (["m", "i", "--threads"], "--threads wants a value"), (["m", "i", "--what", "2"], "there is no option --what")],
)  # fmt: skip
def test_wrong_use_shows_the_usage(program, arguments, part):
    result = run(program, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {part}") and "usage: detect_onnxruntime" in result.stderr


@pytest.mark.skipif(not CUDA.is_dir(), reason=f"CUDA's headers are not in {CUDA}")
def test_the_program_for_tensorrt_compiles(tmp_path):
    include = headers("NvInfer.h", "get_tensorrt_headers.py", tmp_path / "headers")
    command = ["c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-isystem", include]
    command += ["-isystem", CUDA, FOLDER / "detect_tensorrt.cpp"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
