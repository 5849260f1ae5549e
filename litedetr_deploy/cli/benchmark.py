"""litedetr benchmark: what a detector costs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..benchmark.timing import check_threads
from ..errors import LiteDetrError
from ..export import limits
from . import _checks, _options
from ._console import Stages, guarded, print_json
from .latency import DEFAULT, latency, names

benchmark = typer.Typer(no_args_is_help=True, help="Measure what a detector costs.")
benchmark.command()(latency)

CALIBRATION_SCENES = 64  # of the shapes' training set


@benchmark.command()
@guarded
def gflops(
    model: Annotated[
        str, typer.Argument(help="Variant, as in lite-dino-r50-h3l1-2+1x3; or checkpoint; or .onnx model.")
    ] = DEFAULT,
    size: Annotated[
        str | None,
        typer.Option(
            "--image-size", "--image-sizes", "--size", show_default=False,
            help="Image size in pixels, HEIGHTxWIDTH, or one number for a square.  "
            "[default: 850x1040, the paper's, or the ONNX model's own]",
        ),
    ] = None,
    variant: _options.Variant = None,
    force_variant: _options.ForceVariant = False,
    table: Annotated[
        bool, typer.Option("--table", help="Count every model of the paper's tables instead, at its size.")
    ] = False,
    as_json: _options.AsJson = False,
):  # fmt: skip
    """Count the operations and the parameters of a detector, by part; nothing is run.

    In both conventions one multiply-add is one: GFLOPs as papers print them.
    """
    image_size = _checks.image_sizes(size)[0] if size else None
    if table and (size or variant or model != DEFAULT):
        raise LiteDetrError("--table counts the paper's models at the paper's size; give it alone, or with --json.")
    with Stages() as stage:
        stage("load PyTorch")
        from ..benchmark import gflops as counting

        if table:
            found: Any = counting.count_published(stage)
            lines = counting.published_table(found)
        else:
            stage("count")
            found = counting.count(model, image_size, variant, force_variant)
            lines = counting.count_table(model, found)
    if as_json:
        print_json(found)
    else:
        print(*lines, sep="\n")


@benchmark.command()
@guarded
def precision(
    checkpoint: _options.Checkpoint = "lite-dino-shapes",
    variant: _options.Variant = None,
    force_variant: _options.ForceVariant = False,
    data: Annotated[
        Path | None,
        typer.Option(help="What AP is measured on: a COCO folder, as in evaluate.  Not given: the drawn shapes."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Directory of images to calibrate INT8 on; needed with --data.")
    ] = None,
    precisions: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(limits.PRECISIONS),
    attentions: Annotated[str, typer.Option(help="Separated by commas: op, gather, gridsample.")] = "op,gather",
    image_size: _options.ImageSize = "256x256",
    count: _options.Count = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU, at most one a core.")] = 1,
    seconds: Annotated[float, typer.Option(min=0, help="Time for the timed calls of each.")] = 10.0,
    models: Annotated[Path, typer.Option(help="Folder for the exported models.")] = Path("precision"),
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write OUTPUT.json and OUTPUT.md.")] = None,
    as_json: _options.AsJson = False,
):
    """Export a detector in every precision, and compare AP, size and latency.

    Exit status 1 says that a model did not pass its verification.
    """
    wanted = names(precisions), names(attentions)
    for kind in wanted[0]:
        for attention in wanted[1]:
            limits.check(attention, kind, _checks.image_size(image_size), "detections", limits.FIRST_OPSET)
    size = _checks.image_sizes(image_size)[0]
    check_threads([threads])
    if data and "int8" in wanted[0] and calibration is None:
        raise LiteDetrError(
            "INT8 needs images like those of --data to calibrate on: give a directory of them with --calibration, or "
            "leave int8 out of --precisions."
        )
    _checks.checkpoint(checkpoint)
    images: Any = calibration and limits.Int8(calibration).chosen()
    if output:
        _checks.writable_directory(output.parent)
    models.mkdir(parents=True, exist_ok=True)
    with Stages() as stage:
        stage("load PyTorch and the checkpoint")
        import litedetr_deploy as ld

        from ..assets import shapes
        from ..benchmark import precision as measuring
        from ..evaluate.data import drawn_shapes, read_coco

        model = ld.load_model(checkpoint, variant, force_variant)
        stage("read the annotations" if data else "draw the shapes")
        dataset = read_coco(data, None, count) if data else drawn_shapes(count)
        if images is None:
            images = [shapes.scene(i, shapes.TRAIN_SEED)[0] for i in range(CALIBRATION_SCENES)]
        base, graphs = measuring.measure(model, dataset, models, *wanted, size, images, threads, seconds, stage)
    where = f"AP on {dataset.name} ({base.images} images), {threads} thread{'s' if threads > 1 else ''}"
    title = f"{checkpoint} at {size[0]}x{size[1]}, {where}"
    paths = measuring.write_reports(base, graphs, title, output) if output else []
    if as_json:
        print_json(measuring.as_dict(base, graphs, title))
    else:
        print(*measuring.table(base, graphs), "", f"{title}.  {measuring.HOW}", sep="\n")
        if paths:
            print("wrote", ", ".join(map(str, paths)))
    if not all(graph.verified for graph in graphs):
        raise typer.Exit(1)
