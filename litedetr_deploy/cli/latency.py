"""litedetr benchmark latency: how fast detectors are on this machine, whole and by part."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..benchmark import plan as plans
from ..errors import LiteDetrError
from . import _checks
from ._console import Stages, guarded, print_json, stdout_console

_BACKENDS = "; ".join(f"{name}: {backend.about}" for name, backend in plans.BACKENDS.items())


@guarded
def latency(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to measure: variants, as in lite-dino-r50-h3l1-2+1x3 (with random weights, times do not depend on "
            "them); checkpoints; or artifacts: .onnx, .plan, .engine.  Not given: lite-dino-r50-h3l1-2+1x3.",
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
        str, typer.Option(help="HEIGHTxWIDTH in pixels, separated by commas.  Artifacts of a fixed size keep theirs.")
    ] = "800x1333",
    batch_sizes: Annotated[str, typer.Option(help="Images a call, separated by commas.")] = "1",
    threads: Annotated[
        str, typer.Option(help="Threads of the CPU, separated by commas.  Not given: one a core.", show_default=False)
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
    variant: Annotated[str | None, typer.Option(help="Of a checkpoint that cannot tell, as in export.")] = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Time artifacts also where their weights are not at hand to check them.")
    ] = False,
    cache: Annotated[
        Path,
        typer.Option(
            help="Folder of exported models and of PyTorch's outputs.  Made with --prepare on another machine and copied "
            "here, it makes PyTorch unnecessary here."
        ),
    ] = plans.default_cache(),
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write OUTPUT.json, OUTPUT.md and OUTPUT.png.  An interrupted run goes on when the same "
            "command is given again.",
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
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
        models or ["lite-dino-r50-h3l1-2+1x3"],
        _names(backends),
        _names(precisions),
        _numbers(batch_sizes, "--batch-sizes"),
        _sizes(image_sizes),
        device,
        _numbers(threads, "--threads") if threads else [plans.usable_cores()],
    )
    store = plans.Cache(cache, checkpoint)
    if dry_run:
        _print_plan(plan, store, unchecked)
        return
    if output:
        _checks.writable_directory(output.parent)
    from ..benchmark import latency as measuring
    from ..benchmark import report

    settings = measuring.Settings(seconds, at_once, variant, unchecked)
    described = dataclasses.asdict(settings) | {"checkpoint": checkpoint}
    if prepare:
        _prepare(plan, store, settings, measuring.Preparation)
        return
    machine = measuring.describe_machine()
    kept = measuring.Kept(output, measuring.fingerprint(machine, settings))
    if len(kept):
        print(f"going on: {len(kept)} finished in {kept.path}", file=sys.stderr)
    results = []
    try:
        with Stages() as stage:
            measuring.measure(plan, store, settings, kept, results, stage)
    except KeyboardInterrupt:
        if not as_json:
            _print_results(results, report)
        if len(kept) and output:
            raise KeyboardInterrupt(f"{len(kept)} finished are kept in {kept.path}: the same command goes on") from None
        raise
    paths = report.write_reports(results, machine, described, output) if output else []
    kept.remove()
    if as_json:
        print_json(report.as_dict(results, machine, described))
    else:
        _print_results(results, report)
        if paths:
            print("wrote", ", ".join(map(str, paths)))
    if any(result.status in (measuring.WRONG, measuring.FAILED) for result in results):
        raise typer.Exit(1)
    if all(result.status == measuring.MISSING for result in results):
        raise LiteDetrError(
            "Nothing could be measured: all contenders are missing on this machine, the lines above "
            "say why. `--dry-run` lists it without running anything."
        )


def _names(text):
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _numbers(text, option):
    parts = _names(text)
    if not parts or not all(part.isdigit() for part in parts):
        raise LiteDetrError(f"{option} is {text!r}; it must be whole numbers separated by commas, as in 1,2.")
    return list(map(int, parts))


def _sizes(text):
    sizes = list(map(_checks.image_size, _names(text)))
    if not sizes or None in sizes:
        raise LiteDetrError(f"--image-sizes is {text!r}; a time needs a size: HEIGHTxWIDTH, as in 800x1333,640x640.")
    return sizes


def _print_plan(plan, store, unchecked):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("contender", "size", "where", "state"):
        table.add_column(heading, overflow="fold")
    ready = 0
    for row in plan:
        reason = plans.why_missing(row, store, unchecked)
        ready += not reason
        exported = row.way.engine == "pytorch" or store.model(row).is_file()
        state = "ready" if exported else "ready, to be exported"
        if reason:
            state = f"[yellow]missing:[/] {_escaped(reason)}"
        where = row.device if row.device != "cpu" else f"cpu, {row.threads} thread{'s' if row.threads > 1 else ''}"
        table.add_row(_escaped(row.contender), f"{row.batch}x{row.image_size[0]}x{row.image_size[1]}", where, state)
    stdout_console().print(table)
    print(f"{ready} of {len(plan)} can be measured here; exported models are kept in {store.folder}")
    if extras := plans.missing_extras():
        print("not here, and not needed:", "; ".join(extras))


def _escaped(text):
    from rich.markup import escape

    return escape(text)


def _prepare(plan, store, settings, preparation_class):
    with Stages() as stage:
        preparation = preparation_class(store, settings, stage)
        for row in plan:
            preparation.prepare(row)
    files = {path for row in plan for path in (store.graph(row), store.reference(row)) if path.is_file()}
    size = sum(os.path.getsize(path) for path in files)
    print(f"{store.folder}: {len(files)} files, {size / 1e6:.0f} MB, are ready for {len(plan)} contenders")


def _print_results(results, report):
    from rich import box
    from rich.table import Table

    console = stdout_console()
    for group in report.groups(results):
        table = Table(
            title=f"{report.group_title(group)}; milliseconds",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for column in report.COLUMNS:
            table.add_column(column, justify="left" if column == report.COLUMNS[0] else "right", no_wrap=True)
        troubles = []
        for name, *cells in report.table_rows(group):
            if len(cells) == 1:  # its text would widen a column of numbers
                troubles.append(f"{name}: {cells[0]}")
            else:
                table.add_row(_escaped(name), *cells)
        if table.row_count:
            console.print(table)
        for result in group:
            if result.power and result.power["throttling"]:
                troubles.append(f"{result.row.contender}: THROTTLED, {', '.join(result.power['throttling'])}")
        for trouble in troubles:
            console.print(trouble, style="yellow", markup=False)
