"""litedetr benchmark: what a detector costs."""

import itertools
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..artifact import cache_folder
from ..benchmark import plan as plans
from ..benchmark.timing import check_threads, whole_numbers
from ..errors import LiteDetrError
from ..export import limits
from ..machine import usable_cores
from . import _checks, _options
from ._console import Stages, finish, guarded

CACHE = cache_folder() / "benchmark"
DEFAULT = "lite-dino-r50-h3l1-2+1x3"
CALIBRATION_SCENES = 64  # of the shapes' training set
_BACKENDS = "; ".join(f"{name}: {backend.about}" for name, backend in plans.BACKENDS.items())

benchmark = typer.Typer(no_args_is_help=True, help="Measure what a detector costs.")


@benchmark.command()
@guarded
def latency(
    models: Annotated[list[str] | None, typer.Argument(
        help="What to measure: variants, as in lite-dino-r50-h3l1-2+1x3 (with random weights, times do not depend on "
        f"them); checkpoints; or artifacts: .onnx, .plan, .engine.  Not given: {DEFAULT}.", show_default=False)] = None,
    backends: Annotated[str, typer.Option(
        help=f"What runs variants and checkpoints, separated by commas.  {_BACKENDS}.")
    ] = ",".join(plans.DEFAULT_BACKENDS),
    device: Annotated[str, typer.Option(
        help="cpu, or cuda for an NVIDIA GPU or a Jetson.  Engines always run on cuda.")] = "cpu",
    precisions: Annotated[str, typer.Option(
        help=f"Of variants and checkpoints: {', '.join(plans.PRECISIONS)}, separated by commas.")] = "fp32",
    image_sizes: Annotated[str, typer.Option(
        "--image-size", "--image-sizes", metavar="SIZES",
        help="HEIGHTxWIDTH in pixels, or one number for a square; several separated by commas.  Artifacts of a fixed "
        "size keep theirs.")] = "800x1333",
    batch_sizes: Annotated[str, typer.Option(help="Images a call, separated by commas.")] = "1",
    threads: Annotated[str, typer.Option(
        help="Threads of the CPU, at most one a core, separated by commas.  Not given: one a core.",
        show_default=False)] = "",
    seconds: Annotated[float, typer.Option(
        min=0, help="Time for the calls of each contender; a slow one takes what three calls need.")] = 20.0,
    at_once: Annotated[int, typer.Option(
        min=1, help="How many contenders are loaded together and called in turns.  Fewer need less memory, more are "
        "compared more fairly on a machine that is not quiet.")] = 4,
    checkpoint: Annotated[str | None, typer.Option(
        help="The weights that the artifacts were made from, to check them against PyTorch: a checkpoint, or a "
        "variant's name for its random weights.")] = None,
    variant: _options.Variant = None,
    unchecked: Annotated[bool, typer.Option(
        "--unchecked", help="Time artifacts also where their weights are not at hand to check them.")] = False,
    cache: Annotated[Path, typer.Option(
        help="Folder of exported models and of PyTorch's outputs.  Made with --prepare on another machine and copied "
        "here, it makes PyTorch unnecessary here.")] = CACHE,
    output: Annotated[Path | None, typer.Option(
        "--output", "-o", help="Write OUTPUT.json, OUTPUT.md and OUTPUT.png.  An interrupted run resumes when the same "
        "command is given again.")] = None,
    prepare: Annotated[bool, typer.Option(
        "--prepare", help="Export, and compute PyTorch's outputs, into the cache; measure nothing.")] = False,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="List what would be measured and what this machine lacks for the rest; do nothing.")] = False,
    as_json: _options.AsJson = False,
):  # fmt: skip
    """Time detectors on this machine, whole and by part, and check every one before.

    Each runs in a process of its own, in turns with the others. Its outputs are compared with PyTorch's first: what is
    wrong is reported and not timed, and the exit status is 1.

    On a Jetson: choose the power mode, run jetson_clocks, build the engine there with `litedetr build`, then

    litedetr benchmark latency model.plan --checkpoint model.pth -o orin

    Without PyTorch on the Jetson, first run

    litedetr benchmark latency model.pth --prepare --cache FOLDER

    on a PC, copy FOLDER and model.pth, and add --cache FOLDER to the command above. Power, clock, temperature and
    throttling are read while it runs.

    Run it on a quiet machine. Ctrl-C keeps what is finished.
    """
    counts = whole_numbers(threads, "--threads") if threads else [usable_cores()]
    batches, sizes = whole_numbers(batch_sizes, "--batch-sizes"), _checks.image_sizes(image_sizes)
    plan = plans.make_plan(models or [DEFAULT], names(backends), names(precisions), batches, sizes, device, counts)
    if output:
        _checks.writable_directory(output.parent)
    from ..benchmark import harness
    from ..benchmark import latency as measuring

    store = plans.Cache(cache, checkpoint, variant, _build_engine)
    if dry_run:
        rows, lines = plans.describe_plan(plan, store, unchecked)
        finish({"plan": rows, "cache": str(cache)}, as_json, True, _print, lines)
        return
    if prepare:
        with Stages() as stage:
            store.progress = stage
            files = store.prepare(plan)
        size = sum(map(os.path.getsize, files))
        found = {"cache": str(cache), "files": list(map(str, files)), "bytes": size}
        line = f"{cache}: {len(files)} files, {size / 1e6:.0f} MB, are ready for {len(plan)} contenders"
        finish(found, as_json, True, _print, [line])
        return
    run = measuring.Run(plan, store, measuring.Settings(seconds, at_once), output, unchecked)
    try:
        with Stages() as stage:
            run.measure(stage)
    finally:
        if not as_json:
            print(*measuring.tables(run.results), sep="\n")
    statuses = {result.status for result in run.results}
    passed = not statuses & {harness.WRONG, harness.FAILED}
    finish(run.to_dict(), as_json, passed, _print, wrote(run.write()))
    if statuses <= {harness.MISSING}:
        raise LiteDetrError(
            "Nothing could be measured: all contenders are missing on this machine, the lines above say why. "
            "`--dry-run` lists it without running anything."
        )


def _build_engine(graph, path, batch):
    import litedetr_deploy as ld

    # What is timed is checked before, in the engine that is timed.
    ld.build_engine(graph, path, batch=[batch] * 3, verify=False, allow_unverified=True)


@benchmark.command()
@guarded
def gflops(
    model: Annotated[str, typer.Argument(
        help="Variant, as in lite-dino-r50-h3l1-2+1x3; or checkpoint; or .onnx model.")] = DEFAULT,
    size: Annotated[str | None, typer.Option(
        "--image-size", "--image-sizes", "--size", show_default=False,
        help="Image size in pixels, HEIGHTxWIDTH, or one number for a square.  "
        "[default: 850x1040, the paper's, or the ONNX model's own]")] = None,
    variant: _options.Variant = None,
    force_variant: _options.ForceVariant = False,
    table: Annotated[bool, typer.Option(
        "--table", help="Count every model of the paper's tables instead, at its size.")] = False,
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
    finish(found, as_json, True, _print, lines)


@benchmark.command()
@guarded
def precision(
    checkpoint: _options.Checkpoint = "lite-dino-shapes",
    variant: _options.Variant = None,
    force_variant: _options.ForceVariant = False,
    data: Annotated[Path | None, typer.Option(
        help="What AP is measured on: a COCO folder, as in evaluate.  Not given: the drawn shapes.")] = None,
    calibration: Annotated[Path | None, typer.Option(
        help="Directory of images to calibrate INT8 on; needed with --data.")] = None,
    precisions: Annotated[str, typer.Option(
        help=f"Separated by commas: {', '.join(limits.PRECISIONS)}; and {limits.INT8_ON_CPU}, INT8 with --target cpu.",
    )] = ",".join((*limits.PRECISIONS, limits.INT8_ON_CPU)),
    attentions: Annotated[str, typer.Option(help="Separated by commas: op, gather, gridsample.")] = "op,gather",
    image_size: _options.ImageSize = "256x256",
    count: _options.Count = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU, at most one a core.")] = 1,
    seconds: Annotated[float, typer.Option(min=0, help="Time for the timed calls of each.")] = 10.0,
    models: Annotated[Path, typer.Option(help="Folder for the exported models.")] = Path("precision"),
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write OUTPUT.json and OUTPUT.md.")] = None,
    as_json: _options.AsJson = False,
):  # fmt: skip
    """Export a detector in every precision, and compare AP, size and latency.

    Exit status 1 says that a model did not pass its verification.
    """
    wanted, size = (names(precisions), names(attentions)), _checks.image_sizes(image_size)[0]
    for kind, attention in itertools.product(*wanted):
        export_precision, target = limits.split(kind)
        limits.check(attention, export_precision, size, "detections", limits.FIRST_OPSET, target=target)
    check_threads([threads])
    if data and "int8" in {limits.split(kind)[0] for kind in wanted[0]} and calibration is None:
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
        base, rows = measuring.measure(model, dataset, models, *wanted, size, images, threads, seconds, stage)
    where = f"AP on {dataset.name} ({base.images} images), {threads} thread{'s' if threads > 1 else ''}"
    title = f"{checkpoint} at {size[0]}x{size[1]}, {where}"
    found = measuring.as_dict(base, rows, title)
    paths = measuring.write_reports(found, output) if output else []
    lines = [*measuring.table(found), "", f"{title}.  {measuring.HOW}", *wrote(paths)]
    finish(found, as_json, all(row["verified"] for row in rows), _print, lines)


def names(text):
    """Return the parts of a comma-separated list, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _print(_, lines):
    if lines:
        print(*lines, sep="\n")


def wrote(paths):
    """Return the lines that name the files of a report."""
    return [f"wrote {', '.join(map(str, paths))}"] if paths else []
