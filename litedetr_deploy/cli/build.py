"""litedetr build: an ONNX model or a checkpoint to a verified TensorRT engine."""

from pathlib import Path

from ..artifact import check_file
from ..errors import printable
from . import _checks
from ._console import Stages, finish, print_verdict
from ._options import Recipe


def build(
    model: str,
    output: Path,
    backend: str = "tensorrt",
    batch: str | None = None,
    image_size: str | None = None,
    precision: str = "fp32",
    variant: str | None = None,
    force_variant: bool = False,
    compute_capability: list[str] | None = None,
    timing_cache: Path | None = None,
    workspace: float | None = None,
    optimization_level: int | None = None,
    version_compatible: bool = False,
    hardware_compatibility: str = "none",
    tf32: bool = False,
    allow_known_bad: bool = False,
    allow_unverified: bool = False,
    images: list[Path] | None = None,
    no_verify: bool = False,
    recipe: Recipe = None,
    verbose: bool = False,
    as_json: bool = False,
):
    """Build an engine, inspect it, and prove that it computes what the ONNX model does."""
    batches = None if batch is None else _checks.batch(batch)
    sizes = _checks.image_sizes(image_size) if image_size else None
    if Path(model).suffix.lower() == ".onnx":
        check_file(model, "the model")
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

    finish(report, as_json, report["passed"], _print, verbose)


def _print(report, verbose):
    for warning in report["warnings"]:
        print(f"warning: {printable(warning)}")
    for name, shapes in report["shapes"].items():
        smallest, best, largest = ("x".join(map(str, shape)) for shape in shapes)
        print(f"{name}: {smallest} to {largest}, best at {best}")
    if (types := report["layer_types"]) is not None:
        print("layers: " + ", ".join(f"{count} {name}" for name, count in types.items()))
    if lost := report["lost_precision"]:
        print(f"CHECK FAILED: the graph's precision is {lost}, and no layer of the engine has it")
    target = report["gpu"] or f"compute capability {', '.join(report['compute_capabilities'])}"
    what = f"{report['backend']} {report['version']} for {target}, {report['metadata']['precision']}"
    print(
        f"{printable(report['path'])}: {report['size_bytes'] / 1e6:.1f} MB, {what}, made in {report['seconds']:.0f} s"
    )
    print_verdict(report["verdict"], verbose)
