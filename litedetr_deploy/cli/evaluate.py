"""litedetr evaluate: how right and how fast is an artifact on annotated images?"""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LiteDetrError, printable
from ..files import replaced_when_done
from . import _checks
from ._console import Stages, escaped, guarded, new_table, print_json, stdout_console
from ._options import AsJson, Count, Data, ForceVariant, Resize, Shapes, Threads, Variant


@guarded
def evaluate(
    artifact: Annotated[
        str,
        typer.Argument(
            help="ONNX model; engine (.plan); or checkpoint, or the name of one that comes with this package, to run "
            "in PyTorch."
        ),
    ],
    data: Data = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images of an annotation file.")] = None,
    shapes: Shapes = False,
    count: Count = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a run at most.")] = 1,
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size",
            "--image-sizes",
            help="Input size in pixels, HEIGHTxWIDTH or one number for a square, for a model of dynamic size or a "
            "checkpoint; by default the data's or the other artifact's, if it is fixed.",
        ),
    ] = None,
    resize: Resize = None,
    variant: Variant = None,
    force_variant: ForceVariant = False,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="Execution provider of ONNX Runtime for ONNX models; can be repeated, first choice first."),
    ] = None,
    threads: Threads = None,
    against: Annotated[
        str | None, typer.Option(help="A second artifact: evaluate both and compare their detections.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="With --against: fail when the two APs (0..1) differ by more.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the report, as JSON.")] = None,
    as_json: AsJson = False,
):
    """Compute the COCO AP and the latency of an artifact, or compare two.

    An interrupted evaluation continues where it was when the same command is given again.
    """
    if shapes == (data is not None):
        raise LiteDetrError(
            "Say what to evaluate on: either --shapes, or --data with a COCO folder or annotation file."
        )
    if images is not None and data is None:
        raise LiteDetrError("--images is the folder of the images of --data; the drawn shapes need none.")
    if tolerance is not None and against is None:
        raise LiteDetrError("--tolerance compares the AP of two artifacts: give the second with --against.")
    size = _checks.image_size(image_size) if image_size else None
    if output:
        _checks.writable_directory(output.parent)
    from ..evaluate import evaluate as evaluating
    from ..evaluate.data import drawn_shapes, read_coco

    began = time.monotonic()
    with Stages() as stage:
        stage("draw the shapes" if shapes else "read the annotations")
        dataset = drawn_shapes(count) if shapes else read_coco(data, images, count)
        options = evaluating.Options(variant, force_variant, size, resize, batch_size, provider or None, threads)
        if against is None:
            report = evaluating.evaluate(artifact, dataset, options, stage).to_dict()
        else:
            report = evaluating.compare(artifact, against, dataset, options, tolerance, stage).to_dict()
    passed = against is None or report["comparison"].get("passed", True)
    if output:
        with replaced_when_done(output) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")

    if as_json:
        print_json(report)
    else:
        _print_report(report)
        if not passed:
            verdict = f"; CHECK FAILED: the APs differ by more than {tolerance:g}"
        else:
            verdict = "" if tolerance is None else f"; the APs agree within {tolerance:g}"
        saved = f", report in {printable(output)}" if output else ""
        print(
            f"{printable(dataset.name)}: {report['images']} images with {report['objects']} objects, done in "
            f"{time.monotonic() - began:.0f} s{saved}{verdict}"
        )
    if not passed:
        raise typer.Exit(1)


def _print_report(report):
    columns = [report, *([report["against"]] if "against" in report else [])]
    table = new_table("", *(escaped(column["artifact"]) for column in columns))
    for name in report["metrics"]:
        table.add_row(name, *(_number(column["metrics"][name], ".3f") for column in columns))
    for name, key in (("median ms an image", "median"), ("90th percentile", "p90")):
        table.add_row(name, *(_number(column["latency_ms"][key], ".1f") for column in columns))
    table.add_row("images/s", *(_number(column["images_per_second"], ".2f") for column in columns))
    table.add_row("input", *(_input(column) for column in columns))
    stdout_console().print(table)
    if "comparison" in report:
        found = report["comparison"]["detections"]
        boxes, scores = found["box_difference_px"], found["score_difference"]
        names = [printable(column["artifact"]) for column in columns]
        print(
            f"AP differs by {report['comparison']['ap_difference']:+.4f}. Of the detections that score "
            f"{found['score_floor']:g} or more, {found['matched']} match (same label, IoU {found['iou_floor']:g} or "
            f"more); unmatched: {found['unmatched'][0]} of {names[0]}, {found['unmatched'][1]} of {names[1]}."
        )
        if found["matched"]:
            print(
                f"Matches differ in boxes by {boxes['mean']:.2g} pixels in the mean and {boxes['largest']:.2g} at "
                f"most, in scores by {scores['mean']:.2g} and {scores['largest']:.2g}."
            )


def _number(value, form):
    return "-" if value is None else format(value, form)


def _input(column):
    size = "x".join(map(str, column["image_size"])) + ", " if column["image_size"] else ""
    return f"{size}{column['resize']}, batch {column['batch_size']}"
