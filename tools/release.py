"""Make a release of the version in litedetr_deploy/__init__.py, and print what to upload:

    python tools/release.py

Checks that the tree is clean and the changelog has the version with its date, runs all tests (once for a commit),
builds the wheels and the source distribution into dist/, installs each in an environment of its own, and there runs
`litedetr doctor` and the export of `make demo`; the wheel of aarch64 runs under QEMU.  Uploads nothing.
"""

import hashlib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from build_wheel import ROOT, build_wheel, print_libraries, run

from litedetr_deploy import __version__
from litedetr_deploy.ops.native import LIBRARIES

DIST = ROOT / "dist"
TESTED = ROOT / "build" / "tested"  # the commit whose tests passed
# The parser for DeepStream needs its headers, which are on no machine without it.
REQUIRED = set(LIBRARIES.values()) - {LIBRARIES["deepstream"]}
EXPORT = ("lite-dino-shapes", "-o", "shapes.onnx", "--image-size", "256x256")


def main() -> None:
    os.chdir(ROOT)
    commit = check_tree()
    if TESTED.is_file() and TESTED.read_text() == commit:
        print(f"The tests of {commit[:12]} have passed before.")
    else:
        run(ROOT / ".ci" / "run")
        TESTED.write_text(commit)
    shutil.rmtree(DIST, ignore_errors=True)
    native = build_wheel(DIST, "x86_64")
    crossed = build_wheel(DIST, "aarch64")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST)
    (source,) = DIST.glob("*.tar.gz")
    for wheel in (native, crossed):
        if missing := REQUIRED - print_libraries(wheel):
            sys.exit(f"{wheel.name} lacks {', '.join(sorted(missing))}: this machine cannot build a release.")
    with tempfile.TemporaryDirectory() as scratch:
        for artifact in (native, source):
            model = try_out(artifact, Path(scratch) / artifact.name.replace(".", "-"))
        run(ROOT / "tools" / "run_aarch64_wheel.sh", crossed, model, ROOT / "docs" / "scene.png")
    if run("git", "status", "--porcelain", capture_output=True).stdout:
        sys.exit("The tree is no longer clean: what was built is not what was committed.")
    print(f"\nlitedetr-deploy {__version__} is ready: {commit[:12]}, to be tagged v{__version__}.  To upload:")
    for artifact in sorted(DIST.iterdir()):
        digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
        print(f"  {artifact.relative_to(ROOT)}  {artifact.stat().st_size / 1e6:.1f} MB  sha256 {digest}")


def check_tree() -> str:
    """Return the commit that is checked out; end where it is not one to release."""
    if changed := run("git", "status", "--porcelain", capture_output=True).stdout:
        sys.exit(f"The tree is not clean; commit or remove:\n{changed}")
    heading = rf"^## \[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d$"
    if not re.search(heading, (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE):
        sys.exit(
            f"CHANGELOG.md has no line `## [{__version__}] - YYYY-MM-DD`, and {__version__} is the version in "
            "litedetr_deploy/__init__.py: give the changes their version and date, or the package its version."
        )
    commit = run("git", "rev-parse", "HEAD", capture_output=True).stdout.strip()
    tagged = run("git", "tag", "--list", f"v{__version__}", "--no-contains", "HEAD", capture_output=True).stdout
    if tagged:
        sys.exit(f"The tag {tagged.strip()} is on another commit: a version is released once.")
    return commit


def try_out(artifact: Path, folder: Path) -> Path:
    """Install a wheel or a source distribution in a new environment, run it there, and return the model exported."""
    print(f"\n{artifact.name}, installed by itself:", flush=True)
    run(sys.executable, "-m", "venv", folder)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run(*pip, "--constraint", ROOT / "constraints.txt", f"{artifact}[export]")
    run(folder / "bin" / "litedetr", "doctor", cwd=folder)
    run(folder / "bin" / "litedetr-export", *EXPORT, cwd=folder)
    return folder / "shapes.onnx"


if __name__ == "__main__":
    main()
