"""litedetr evaluate: how right and how fast is an artifact on annotated images?"""

import contextlib
import functools
import json
import sys
import time
from pathlib import Path

from ..errors import LiteDetrError, printable
from ..files import replaced_when_done
from . import _checks
from ._console import Stages, escaped, finish, new_table, stdout_console


def evaluate(
    artifact: str,
    data: Path | None = None,
    images: Path | None = None,
    shapes: bool = False,
    count: int | None = None,
    batch_size: int = 1,
    image_size: str | None = None,
    resize: str | None = None,
    variant: str | None = None,
    force_variant: bool = False,
    runtime: str | None = None,
    precision: str | None = None,
    provider: list[str] | None = None,
    threads: int | None = None,
    against: str | None = None,
    tolerance: float | None = None,
    output: Path | None = None,
    ray: bool = False,
    ray_address: str | None = None,
    workers: int | None = None,
    as_json: bool = False,
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
    with Stages() as stage, contextlib.redirect_stdout(sys.stderr):  # where Ray says that workers ended
        stage("draw the shapes" if shapes else "read the annotations")
        dataset = drawn_shapes(count) if shapes else read_coco(data, images, count)
        options = evaluating.Options(
            variant, force_variant, size, resize, batch_size, provider or None, threads, runtime, precision
        )
        elsewhere = None
        if ray:
            from ..serve.ray import Cluster, evaluator

            elsewhere = evaluator(Cluster(ray_address, workers), stage)
        if against is None:
            report = evaluating.evaluate(artifact, dataset, options, stage, elsewhere).to_dict()
        else:
            report = evaluating.compare(artifact, against, dataset, options, tolerance, stage, elsewhere).to_dict()
    passed = against is None or report["comparison"].get("passed", True)
    if output:
        with replaced_when_done(output) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")

    verdict = "" if tolerance is None else f"; the APs agree within {tolerance:g}"
    if not passed:
        verdict = f"; CHECK FAILED: the APs differ by more than {tolerance:g}"
    end = (
        f"{printable(dataset.name)}: {report['images']} images with {report['objects']} objects, done in "
        f"{time.monotonic() - began:.0f} s{f', report in {printable(output)}' if output else ''}{verdict}"
    )
    finish(report, as_json, passed, _print, end)


def _print(report, end):
    columns = [report, *([report["against"]] if "against" in report else [])]

    def add_row(name, form, *keys):
        values = [functools.reduce(dict.get, keys, column) for column in columns]
        table.add_row(name, *("-" if value is None else format(value, form) for value in values))

    names = [printable(column["artifact"]) for column in columns]
    table = new_table("", *map(escaped, names))
    for name in report["metrics"]:
        add_row(name, ".3f", "metrics", name)
    add_row("median ms an image", ".1f", "latency_ms", "median")
    add_row("90th percentile", ".1f", "latency_ms", "p90")
    add_row("images/s", ".2f", "images_per_second")
    sizes = ["x".join(map(str, column["image_size"])) + ", " if column["image_size"] else "" for column in columns]
    inputs = (f"{size}{column['resize']}, batch {column['batch_size']}" for size, column in zip(sizes, columns))
    table.add_row("input", *inputs)
    stdout_console().print(table)
    if "comparison" in report:
        found = report["comparison"]["detections"]
        boxes, scores = found["box_difference_px"], found["score_difference"]
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
    print(end)
