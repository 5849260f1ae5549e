#!/usr/bin/env python3
"""Downloads the C++ headers of TensorRT into a folder and prints where they are:

    tools/get_tensorrt_headers.py FOLDER

They are the 10.14 set, which a plugin needs to load in TensorRT 10 and 11 alike, and come out of a package that ships
them under their own licence (Apache-2.0); nothing else of it is unpacked and none of it is installed.  pip downloads it
from the index that pip is set up for and verifies its hash.  A second run finds the headers and downloads nothing.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "kernel-lens==2.0.1 --hash=sha256:07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
FOLDER_IN_WHEEL = "kernel_lens/include/tensorrt/"
HEADER = "NvInferRuntime.h"


def main() -> int:
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    try:
        if not (folder / HEADER).is_file():
            get_headers(folder)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        print(
            f"{Path(sys.argv[0]).name}: {error} Or give CMake the folder of {HEADER}: -DTENSORRT_INCLUDE_DIR=FOLDER.",
            file=sys.stderr,
        )
        return 1
    print(folder)
    return 0


def get_headers(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as name:
        scratch = Path(name)
        with zipfile.ZipFile(download_wheel(scratch)) as wheel:
            headers = [member for member in wheel.namelist() if member.startswith(FOLDER_IN_WHEEL)]
            wheel.extractall(scratch, headers)
        unpacked = scratch / FOLDER_IN_WHEEL
        if not (unpacked / HEADER).is_file():
            raise RuntimeError(f"the package has no {FOLDER_IN_WHEEL}{HEADER}.")
        # One rename, so that no half-filled folder is ever found; of two that run at once the first wins.
        try:
            unpacked.rename(folder)
        except OSError:
            if not (folder / HEADER).is_file():
                raise


def download_wheel(scratch: Path) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(REQUIREMENT + "\n")
    arguments = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    arguments += ["--require-hashes", "--requirement", str(requirements), "--dest", str(scratch)]
    arguments += ["--retries", "2", "--timeout", "20"]
    # A build may run in a Python that has no pip.
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [shutil.which("pip3") or "pip"]
    try:
        subprocess.run([*pip, *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError("pip is not installed, and the headers come out of a Python package.") from None
    except subprocess.CalledProcessError as error:
        errors = [line for line in error.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = (errors or error.stderr.splitlines() or [f"pip exited with {error.returncode}"])[-1]
        raise RuntimeError(f"{REQUIREMENT.split()[0]} cannot be downloaded ({reason}).") from None
    return next(scratch.glob("*.whl"))


if __name__ == "__main__":
    sys.exit(main())
