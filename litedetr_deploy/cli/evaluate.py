"""litedetr evaluate: how right and how fast is an artifact on annotated images?"""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LiteDetrError
from ..files import replaced_when_done
from . import _checks
from ._console import Stages, guarded, print_json, stdout_console


@guarded
def evaluate(
    artifact: Annotated[
        str,
        typer.Argument(
            help="ONNX model; engine (.plan); or checkpoint, or the name of one that comes with this package, to run in "
            "PyTorch."
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with annotations/instances_val2017.json and val2017 (or instances_val.json and val); or the "
            "annotation file itself."
        ),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images of an annotation file.")] = None,
    shapes: Annotated[
        bool, typer.Option("--shapes", help="Evaluate on the drawn shapes, which need no files.")
    ] = False,
    count: Annotated[int | None, typer.Option(min=1, help="Take the first images only, so many.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a run at most.")] = 1,
    image_size: Annotated[
        str | None,
        typer.Option(
            help="Input size in pixels, HEIGHTxWIDTH, for a model of dynamic size or a checkpoint; by default the "
            "data's or the other artifact's, if it is fixed."
        ),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            help="How an image becomes the model's input: shortest_edge, stretch or letterbox; by default what the model "
            "was exported for."
        ),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="What a checkpoint holds, as in export.")] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="Execution provider of ONNX Runtime for ONNX models; can be repeated, first choice first."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default one a core.")] = None,
    against: Annotated[
        str | None, typer.Option(help="A second artifact: evaluate both and compare their detections.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="With --against: fail when the two APs (0..1) differ by more.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the report, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
):
    """Compute the COCO AP and the latency of an artifact, or compare two.

    An interrupted evaluation goes on where it was when the same command is given again.
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
    from ..evaluate.data import drawn_shapes, read_coco
    from ..evaluate.evaluate import compare
    from ..evaluate.evaluate import evaluate as evaluate_one

    began = time.monotonic()
    with ImageStages() as stage:
        stage("draw the shapes" if shapes else "read the annotations")
        dataset = drawn_shapes(count) if shapes else read_coco(data, images, count)
        options = {
            "variant": variant,
            "image_size": size,
            "resize": resize,
            "batch_size": batch_size,
            "providers": provider or None,
            "threads": threads,
            "progress": stage,
        }
        if against is None:
            report = evaluate_one(artifact, dataset, **options).to_dict()
        else:
            report = compare(artifact, against, dataset, **options).to_dict()
    passed = True
    if tolerance is not None:
        passed = abs(report["comparison"]["ap_difference"]) <= tolerance
        report["comparison"] |= {"tolerance": tolerance, "passed": passed}
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
        print(
            f"{dataset.name}: {report['images']} images with {report['objects']} objects, done in "
            f"{time.monotonic() - began:.0f} s{f', report in {output}' if output else ''}{verdict}"
        )
    if not passed:
        raise typer.Exit(1)


class ImageStages(Stages):
    """Stages, of which some count images: those show a bar, the rate and the time left."""

    def __init__(self):
        from rich.progress import BarColumn, ProgressColumn
        from rich.text import Text

        class Images(ProgressColumn):
            def render(self, task):
                if task.total is None:
                    return Text("")
                rate = f", {task.speed:.1f} images/s" if task.speed else ""
                left = task.time_remaining
                return Text(
                    f"{task.completed:.0f}/{task.total:.0f}{rate}"
                    + ("" if left is None else f", {left // 60:.0f}:{left % 60:02.0f} left")
                )

        super().__init__()
        self._progress.columns += (BarColumn(), Images())
        self._progress.speed_estimate_period = 600  # seconds; an image can take many

    def __call__(self, stage, done=0, total=None):
        if stage != self._stage:
            super().__call__(stage)
            self._progress.reset(self._task, completed=done, total=total)
        else:
            self._progress.update(self._task, completed=done)


def _print_report(report):
    from rich import box
    from rich.table import Table

    columns = [report, *([report["against"]] if "against" in report else [])]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column["artifact"], justify="right", overflow="fold")
    for name in report["metrics"]:
        table.add_row(name, *(_number(column["metrics"][name], ".3f") for column in columns))
    for name, key in (("median ms an image", "median"), ("90th percentile", "p90")):
        table.add_row(name, *(_number(column["latency_ms"][key], ".1f") for column in columns))
    table.add_row("images/s", *(_number(column["images_per_second"], ".2f") for column in columns))
    table.add_row("input", *(_input(column) for column in columns))
    console = stdout_console()
    console.print(table)
    if "comparison" in report:
        found = report["comparison"]["detections"]
        boxes, scores = found["box_difference_px"], found["score_difference"]
        print(
            f"AP differs by {report['comparison']['ap_difference']:+.4f}. Of the detections that score "
            f"{found['score_floor']:g} or more, {found['matched']} match (same label, IoU {found['iou_floor']:g} or "
            f"more); unmatched: {found['unmatched'][0]} of {columns[0]['artifact']}, {found['unmatched'][1]} of "
            f"{columns[1]['artifact']}."
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
