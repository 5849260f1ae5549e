"""litedetr benchmark latency: how fast detectors are on this machine, whole and by part."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ..artifact import cache_folder
from ..benchmark import plan as plans
from ..benchmark.timing import whole_numbers
from ..errors import LiteDetrError
from ..machine import usable_cores
from . import _checks, _options
from ._console import Stages, guarded, print_json

CACHE = cache_folder() / "benchmark"
DEFAULT = "lite-dino-r50-h3l1-2+1x3"
_BACKENDS = "; ".join(f"{name}: {backend.about}" for name, backend in plans.BACKENDS.items())


@guarded
def latency(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to measure: variants, as in lite-dino-r50-h3l1-2+1x3 (with random weights, times do not depend "
            f"on them); checkpoints; or artifacts: .onnx, .plan, .engine.  Not given: {DEFAULT}.",
            show_default=False,
        ),
    ] = None,
    backends: Annotated[
        str, typer.Option(help=f"What runs variants and checkpoints, separated by commas.  {_BACKENDS}.")
    ] = ",".join(plans.DEFAULT_BACKENDS),
    device: Annotated[
        str, typer.Option(help="cpu, or cuda for an NVIDIA GPU or a Jetson.  Engines always run on cuda.")
    ] = "cpu",
    precisions: Annotated[
        str, typer.Option(help=f"Of variants and checkpoints: {', '.join(plans.PRECISIONS)}, separated by commas.")
    ] = "fp32",
    image_sizes: Annotated[
        str,
        typer.Option(
            "--image-size",
            "--image-sizes",
            metavar="SIZES",
            help="HEIGHTxWIDTH in pixels, or one number for a square; several separated by commas.  Artifacts of a "
            "fixed size keep theirs.",
        ),
    ] = "800x1333",
    batch_sizes: Annotated[str, typer.Option(help="Images a call, separated by commas.")] = "1",
    threads: Annotated[
        str,
        typer.Option(
            help="Threads of the CPU, at most one a core, separated by commas.  Not given: one a core.",
            show_default=False,
        ),
    ] = "",
    seconds: Annotated[
        float, typer.Option(min=0, help="Time for the calls of each contender; a slow one takes what three calls need.")
    ] = 20.0,
    at_once: Annotated[
        int,
        typer.Option(
            min=1,
            help="How many contenders are loaded together and called in turns.  Fewer need less memory, more are "
            "compared more fairly on a machine that is not quiet.",
        ),
    ] = 4,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="The weights that the artifacts were made from, to check them against PyTorch: a checkpoint, or a "
            "variant's name for its random weights."
        ),
    ] = None,
    variant: _options.Variant = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Time artifacts also where their weights are not at hand to check them.")
    ] = False,
    cache: Annotated[
        Path,
        typer.Option(
            help="Folder of exported models and of PyTorch's outputs.  Made with --prepare on another machine and "
            "copied here, it makes PyTorch unnecessary here."
        ),
    ] = CACHE,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write OUTPUT.json, OUTPUT.md and OUTPUT.png.  An interrupted run resumes when the same command is "
            "given again.",
        ),
    ] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Export, and compute PyTorch's outputs, into the cache; measure nothing.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="List what would be measured and what this machine lacks for the rest; do nothing."
        ),
    ] = False,
    as_json: _options.AsJson = False,
):
    """Time detectors on this machine, whole and by part, and check every one before.

    Each runs in a process of its own, in turns with the others. Its outputs
    are compared with PyTorch's first: what is wrong is reported and not timed,
    and the exit status is 1.

    On a Jetson: choose the power mode, run jetson_clocks, build the engine
    there with `litedetr build`, then

    litedetr benchmark latency model.plan --checkpoint model.pth -o orin

    Without PyTorch on the Jetson, first run

    litedetr benchmark latency model.pth --prepare --cache FOLDER

    on a PC, copy FOLDER and model.pth, and add --cache FOLDER to the command
    above. Power, clock, temperature and throttling are read while it runs.

    Run it on a quiet machine. Ctrl-C keeps what is finished.
    """
    plan = plans.make_plan(
        models or [DEFAULT],
        names(backends),
        names(precisions),
        whole_numbers(batch_sizes, "--batch-sizes"),
        _checks.image_sizes(image_sizes),
        device,
        whole_numbers(threads, "--threads") if threads else [usable_cores()],
    )
    if output:
        _checks.writable_directory(output.parent)
    from ..benchmark import latency as measuring
    from ..benchmark.cache import Cache

    store = Cache(cache, checkpoint, variant, _build_engine)
    if dry_run:
        rows = plans.plan_rows(plan, store, unchecked)
        if as_json:
            print_json({"plan": rows, "cache": str(cache)})
        else:
            print(*plans.plan_table(rows, store), sep="\n")
        return
    if prepare:
        with Stages() as stage:
            store.progress = stage
            files = store.prepare(plan)
        size = sum(map(os.path.getsize, files))
        if as_json:
            print_json({"cache": str(cache), "files": list(map(str, files)), "bytes": size})
        else:
            print(f"{cache}: {len(files)} files, {size / 1e6:.0f} MB, are ready for {len(plan)} contenders")
        return
    settings = measuring.Settings(seconds, at_once)
    run = measuring.Run(plan, store, settings, output, unchecked)
    try:
        with Stages() as stage:
            run.measure(stage)
    finally:
        if not as_json:
            print(*measuring.tables(run.results), sep="\n")
    paths = run.write()
    if as_json:
        print_json(run.to_dict())
    elif paths:
        print("wrote", ", ".join(map(str, paths)))
    if run.failed:
        raise typer.Exit(1)
    if run.nothing:
        raise LiteDetrError(
            "Nothing could be measured: all contenders are missing on this machine, the lines above say why. "
            "`--dry-run` lists it without running anything."
        )


def _build_engine(graph, path, batch):
    import litedetr_deploy as ld

    # What is timed is checked before, in the engine that is timed.
    ld.build_engine(graph, path, batch=[batch] * 3, verify=False, allow_unverified=True)


def names(text):
    """Return the parts of a comma-separated list, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
