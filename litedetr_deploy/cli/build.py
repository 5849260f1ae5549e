"""litedetr build: an ONNX model or a checkpoint to a verified TensorRT engine."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import printable
from . import _checks
from ._console import Stages, guarded, print_json, print_verdict
from ._options import AsJson, ForceVariant, Images, Variant, Verbose
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
            "--image-size",
            "--image-sizes",
            help="For a model of dynamic size: smallest, best and largest input, as in 480x480,800x1333,1333x1333 "
            "(height x width).  One stands for all three.  For a checkpoint: what it is exported for.",
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="For a checkpoint: fp32, fp16, bf16 or int8.")] = "fp32",
    variant: Variant = None,
    force_variant: ForceVariant = False,
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
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Build from a model that is not verified, or was changed since.")
    ] = False,
    images: Images = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare the engine with the ONNX model.")
    ] = False,
    recipe: Recipe = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
):
    """Build an engine, inspect it, and prove that it computes what the ONNX model does."""
    batches, sizes = _checks.batch(batch), _checks.image_sizes(image_size) if image_size else None
    if Path(model).suffix.lower() == ".onnx":
        _checks.readable_file(Path(model), "model")
    else:
        _checks.checkpoint(model)
    _checks.writable_directory(output.parent)
    files = _checks.image_files(images)

    with Stages() as stage:
        import litedetr_deploy as ld

        from ..engine.api import Options

        options = Options(
            compute_capability or (), timing_cache, workspace, optimization_level, version_compatible,
            hardware_compatibility, tf32, batches, sizes,
        )  # fmt: skip
        report = ld.build_engine(
            model, output, backend, options, precision, variant, force_variant, allow_known_bad, allow_unverified,
            verify=not no_verify, images=files, progress=stage,
        ).to_dict()  # fmt: skip

    if as_json:
        print_json(report)
    else:
        _print(report, verbose)
    if not report["passed"]:
        raise typer.Exit(1)


def _print(report, verbose):
    for warning in report["warnings"]:
        print(f"warning: {printable(warning)}")
    for name, (smallest, best, largest) in report["shapes"].items():
        print(f"{name}: {_shape(smallest)} to {_shape(largest)}, best at {_shape(best)}")
    if (types := report["layer_types"]) is not None:
        print("layers: " + ", ".join(f"{count} {name}" for name, count in types.items()))
    if lost := report["lost_precision"]:
        print(f"CHECK FAILED: the graph's precision is {lost}, and no layer of the engine has it")
    target = report["gpu"] or f"compute capability {', '.join(report['compute_capabilities'])}"
    print(
        f"{printable(report['path'])}: {report['size_bytes'] / 1e6:.1f} MB, {report['backend']} {report['version']} "
        f"for {target}, {report['metadata']['precision']}, made in {report['seconds']:.0f} s"
    )
    print_verdict(report["verdict"], verbose)


def _shape(shape):
    return "x".join(map(str, shape))
