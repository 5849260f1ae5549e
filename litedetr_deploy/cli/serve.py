"""litedetr serve: what a server needs to run an artifact."""

import shlex
from pathlib import Path

import typer

from ..errors import printable
from ._console import Stages, finish, guarded
from ._options import described

serve = typer.Typer(no_args_is_help=True, help="Write what a server needs to run a model.")


def triton(
    model: Path,
    output: Path,
    backend: str | None = None,
    name: str | None = None,
    max_batch_size: int | None = None,
    instances: int = 1,
    device: str | None = None,
    op_library: str | None = None,
    allow_unverified: bool = False,
    as_json: bool = False,
):
    """Write a model repository for the Triton inference server."""
    from ..serve.triton import write_repository

    with Stages() as stage:
        report = write_repository(
            model, output, backend, name, max_batch_size, instances, device, op_library, allow_unverified, stage
        ).to_dict()
    finish(report, as_json, True, _print_triton)


def deepstream(
    engine: Path, output: Path, threshold: float = 0.3, allow_unverified: bool = False, as_json: bool = False
):
    """Write a folder that DeepStream's nvinfer runs: engine, configuration, labels and libraries."""
    from ..serve.deepstream import write_folder

    with Stages() as stage:
        report = write_folder(engine, output, threshold, allow_unverified, stage).to_dict()
    finish(report, as_json, True, _print_deepstream)


def _print_deepstream(report):
    for warning in report["warnings"]:
        print(f"warning: {printable(warning)}")
    height, width = report["image_size"]
    print(f"frames are scaled to {height}x{width} (height x width), batches of up to {report['batch_size']}")
    print(f"{printable(report['path'])}: {report['size_bytes'] / 1e6:.1f} MB, made in {report['seconds']:.1f} s")
    print(f"show a video: {printable(' '.join(report['command']))}")


def _print_triton(report):
    for warning in report["warnings"]:
        print(f"warning: {printable(warning)}")
    batches = f"batches of up to {report['max_batch_size']}" if report["max_batch_size"] else "no batches"
    copies = f"{report['instances']} instance{'s' * (report['instances'] != 1)} on the {report['device'].upper()}"
    print(f"{', '.join(report['models'])}: back end {report['backend']}, {batches}, {copies}")
    if report["op_library"]:
        print(f"op library: the server looks for it at {printable(report['op_library'])}")
    if report["requirements"]:
        packages = [text.partition(">")[0] for text in report["requirements"]]
        print(f"the server's Python needs {', '.join(packages)}: requirements.txt in the repository")
    print(f"{printable(report['path'])}: {report['size_bytes'] / 1e6:.1f} MB, made in {report['seconds']:.1f} s")
    print(f"start a server: {printable(shlex.join(report['command']))}")


for command in (triton, deepstream):
    serve.command()(guarded(described(command)))
