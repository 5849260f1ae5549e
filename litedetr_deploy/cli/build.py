"""litedetr build: an ONNX model or a checkpoint to a verified TensorRT engine."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import LiteDetrError
from . import _checks
from ._console import Stages, guarded, print_json, print_verification
from ._recipe import Recipe


@guarded
def build(
    model: Annotated[
        str,
        typer.Argument(
            help="ONNX model that `litedetr export` made; or a checkpoint, or the name of one that comes with this "
            "package, which is exported first."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The engine to write, .plan or .engine.")],
    backend: Annotated[
        str, typer.Option(help="tensorrt: on the GPU that it is for; tensorrt-rtx: for GeForce and RTX, needs no GPU.")
    ] = "tensorrt",
    batch: Annotated[
        str | None,
        typer.Option(help="Smallest, best and largest batch; 1,1,4 if not given.  One number stands for all three."),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(
            help="For a model of dynamic size: smallest, best and largest input, as in 480x480,800x1333,1333x1333 (height "
            "x width).  One stands for all three.  For a checkpoint: what it is exported for."
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="For a checkpoint: fp32, fp16, bf16 or int8.")] = "fp32",
    variant: Annotated[str | None, typer.Option(help="What a checkpoint holds, as in export.")] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            help="Build for it, as in 8.6; can be repeated.  tensorrt-rtx only; 8.0, 8.6, 8.9 and 12.0 if not given."
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File that keeps TensorRT's measurements: read if it is there, and written.")
    ] = None,
    workspace: Annotated[float | None, typer.Option(help="GiB of GPU memory that a layer may work in.")] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="0 builds fastest; TensorRT's own is 3.")
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option("--version-compatible", help="The engine runs in newer TensorRT as well, and holds the plugins."),
    ] = False,
    hardware_compatibility: Annotated[
        str, typer.Option(help="none, ampere+, or same-compute-capability: on which other GPUs the engine runs.")
    ] = "none",
    tf32: Annotated[bool, typer.Option("--tf32", help="Let FP32 products use TF32.")] = False,
    allow_known_bad: Annotated[
        bool, typer.Option("--allow-known-bad", help="Build with a version that is known to build wrong engines.")
    ] = False,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="Picture or directory of pictures to verify with; can be repeated.  Not given: drawn samples."
        ),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare the engine with the ONNX model.")
    ] = False,
    recipe: Recipe = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
):
    """Build an engine, look into it, and prove that it computes what the ONNX model does."""
    batches, sizes = _batch(batch), image_size and [_checks.image_size(size) for size in image_size.split(",")]
    if sizes and None in sizes:
        raise LiteDetrError("an engine has sizes that are known: give --image-size as 480x480,800x1333,1333x1333.")
    if Path(model).suffix.lower() == ".onnx":
        _checks.readable_file(Path(model), "model")
    else:
        _checks.checkpoint(model)
    _checks.writable_directory(output.parent)
    files = _checks.image_files(images)

    with _BuildStages() as stage:
        import litedetr_deploy as ld

        report = ld.build_engine(
            model,
            output,
            backend=backend,
            batch=batches,
            image_size=sizes,
            precision=precision,
            variant=variant,
            compute_capabilities=compute_capability or (),
            timing_cache=timing_cache,
            workspace=workspace,
            optimization_level=optimization_level,
            version_compatible=version_compatible,
            hardware_compatibility=hardware_compatibility,
            tf32=tf32,
            allow_known_bad=allow_known_bad,
            verify=not no_verify,
            images=files,
            progress=stage,
        ).to_dict()

    if as_json:
        print_json(report)
    else:
        _print(report)
    if not report["passed"]:
        raise typer.Exit(1)


class _BuildStages(Stages):
    """Stages, of which the build itself shows a bar."""

    def __init__(self):
        from rich.progress import BarColumn, TaskProgressColumn

        super().__init__()
        self._progress.columns += (BarColumn(), TaskProgressColumn())

    def __call__(self, stage, done=0, total=None):
        if stage != self._stage:
            super().__call__(stage)
        self._progress.update(self._task, completed=done, total=total)


def _batch(text):
    if text is None:
        return None
    try:
        numbers = [int(number) for number in str(text).split(",")]
    except ValueError:
        raise LiteDetrError(
            f"the batch is {text!r}; it must be the smallest, the best and the largest, as in 1,1,4, or one number."
        ) from None
    return numbers * 3 if len(numbers) == 1 else numbers


def _print(report):
    if report["verification"]:
        print_verification(report["verification"])
    for warning in report["warnings"]:
        print(f"warning: {warning}")
    for name, (smallest, best, largest) in report["shapes"].items():
        print(f"{name}: {_shape(smallest)} to {_shape(largest)}, best at {_shape(best)}")
    if (types := report["layer_types"]) is not None:
        print("layers: " + ", ".join(f"{count} {name}" for name, count in types.items()))
        precision = report["metadata"]["precision"]
        if precision != "fp32" and not types[precision]:
            print(f"CHECK FAILED: the graph's precision is {precision}, and no layer of the engine has it")
    target = report["gpu"] or f"compute capability {', '.join(report['compute_capabilities'])}"
    print(
        f"{report['path']}: {report['size_bytes'] / 1e6:.1f} MB, {report['backend']} {report['version']} for "
        f"{target}, {report['metadata']['precision']}, made in {report['seconds']:.0f} s; {_verdict(report)}"
    )


def _shape(shape):
    return "x".join(map(str, shape))


def _verdict(report):
    if report["not_verified"]:
        looked = " or inspected" if report["not_inspected"] else ""
        return f"not verified{looked}: {report['not_verified']}"
    failed = any(not row["passed"] for row in report["verification"])
    return "VERIFICATION FAILED: it does not agree with the ONNX model" if failed else "verified against the ONNX model"
