"""litedetr benchmark: what a detector costs."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import LiteDetrError
from ..export import limits
from . import _checks
from ._console import Stages, guarded, print_json, stdout_console
from .evaluate import ImageStages
from .latency import latency

benchmark = typer.Typer(no_args_is_help=True, help="Measure what a detector costs.")
benchmark.command()(latency)

CALIBRATION_SCENES = 64  # of the shapes' training set

DEFAULT = "lite-dino-r50-h3l1-2+1x3"
_CONVENTIONS = (
    "fvcore: as fvcore counts the official code, as in the paper: convolutions, matrix products, norms and bilinear "
    "sampling, and what that code computes for training only.  all: what this package runs, softmax, sums, activations "
    "and reductions counted too.  The unit of both is one multiply-add."
)


@benchmark.command()
@guarded
def gflops(
    model: Annotated[
        str, typer.Argument(help="Variant, as in lite-dino-r50-h3l1-2+1x3; or checkpoint; or .onnx model.")
    ] = DEFAULT,
    size: Annotated[
        str | None,
        typer.Option(
            help="Image size, HEIGHTxWIDTH in pixels.  [default: 850x1040, the paper's, or the ONNX model's own]",
            show_default=False,
        ),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="What a checkpoint holds, as in export.")] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Count every row of the paper's tables instead, at its size.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
):
    """Count the operations and the parameters of a detector, by part; nothing is run.

    In both conventions one multiply-add is one: GFLOPs as papers print them.
    """
    image_size = _checks.image_size(size) if size else None
    if size and image_size is None:
        raise LiteDetrError(f"--size is {size!r}; a count needs a size: HEIGHTxWIDTH, as in 850x1040.")
    if table and (size or variant or model != DEFAULT):
        raise LiteDetrError("--table counts the paper's models at the paper's size; give it alone, or with --json.")
    if table:
        rows = _count_table()
        if as_json:
            print_json(rows)
        else:
            _print_table(rows)
        return
    with Stages() as stage:
        stage("load PyTorch")
        from ..model.flops import PAPER_SIZE, count_flops

        stage("count")
        if Path(model).suffix == ".onnx":
            _checks.readable_file(Path(model), "model")
            from ..model.onnx_flops import count_onnx_flops

            count = count_onnx_flops(model, image_size).to_dict()
        else:
            count = count_flops(_config(model, variant), image_size or PAPER_SIZE).to_dict()
    if as_json:
        print_json(count)
    else:
        _print_count(model, count)


@benchmark.command()
@guarded
def precision(
    checkpoint: Annotated[
        str,
        typer.Argument(help="Trained weights: .pth or .safetensors; or the name of those that come with this package."),
    ] = "lite-dino-shapes",
    variant: Annotated[str | None, typer.Option(help="What the checkpoint holds, as in export.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="What AP is measured on: a COCO folder, as in evaluate.  Not given: the drawn shapes."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Directory of pictures to calibrate INT8 on; needed with --data.")
    ] = None,
    precisions: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(limits.PRECISIONS),
    attentions: Annotated[str, typer.Option(help="Separated by commas: op, gather, gridsample.")] = "op,gather",
    image_size: Annotated[
        str, typer.Option(help="Input size in pixels, HEIGHTxWIDTH; the shapes' is 256x256.")
    ] = "256x256",
    count: Annotated[int | None, typer.Option(min=1, help="Take the first images only, so many.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU.")] = 1,
    seconds: Annotated[float, typer.Option(min=0, help="Time for the timed calls of each.")] = 10.0,
    models: Annotated[Path, typer.Option(help="Folder for the exported models.")] = Path("precision"),
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write OUTPUT.json and OUTPUT.md.")] = None,
):
    """Export a detector in every precision, and compare AP, size and latency.

    Exit status 1 says that a model did not pass its verification.
    """
    size = _checks.image_size(image_size)
    wanted = [[part.strip() for part in text.split(",") if part.strip()] for text in (precisions, attentions)]
    for kind in wanted[0]:
        for attention in wanted[1]:
            limits.check(attention, kind, size, "detections", limits.FIRST_OPSET)
    if size is None:
        raise LiteDetrError("--image-size is 'dynamic'; a time needs a size: HEIGHTxWIDTH, as in 800x1333.")
    if data and "int8" in wanted[0] and calibration is None:
        raise LiteDetrError(
            "INT8 needs pictures like those of --data to calibrate on: give a directory of them with "
            "--calibration, or leave int8 out of --precisions."
        )
    _checks.checkpoint(checkpoint)
    pictures = calibration and limits.calibration_images(calibration, None)
    if output:
        _checks.writable_directory(output.parent)
    models.mkdir(parents=True, exist_ok=True)
    with ImageStages() as stage:
        stage("load PyTorch and the checkpoint")
        import litedetr_deploy as ld

        from ..assets import shapes
        from ..benchmark import precision as measuring
        from ..evaluate.data import drawn_shapes, read_coco

        model = ld.load_model(checkpoint, variant)
        stage("read the annotations" if data else "draw the shapes")
        dataset = read_coco(data, None, count) if data else drawn_shapes(count)
        if pictures is None:
            pictures = [shapes.scene(i, shapes.TRAIN_SEED)[0] for i in range(CALIBRATION_SCENES)]
        base, rows = measuring.measure(model, dataset, models, *wanted, size, pictures, threads, seconds, stage)
    title = (
        f"{checkpoint} at {image_size}, AP on {dataset.name} ({base.images} images), {threads} "
        f"thread{'s' if threads > 1 else ''}"
    )
    table = _new_table(*measuring.COLUMNS)
    for row in measuring.table_rows(base, rows):
        table.add_row(*row)
    console = stdout_console()
    console.print(table)
    console.print(f"{title}.  {measuring.HOW}", markup=False)
    if output:
        print("wrote", ", ".join(map(str, measuring.write_reports(base, rows, title, output))))
    if not all(row.verified for row in rows):
        raise typer.Exit(1)


def _config(model, variant):
    from .. import assets
    from ..model.config import parse_variant

    if model not in assets.NAMES and not Path(model).exists():
        if variant:
            raise LiteDetrError(f"The checkpoint {model} does not exist. Check the path, or give the variant alone.")
        return parse_variant(model)
    from ..model.checkpoints.official import load_model

    return load_model(model, variant).config


def _count_table():
    """The paper's rows with our counts beside them."""
    with Stages() as stage:
        stage("load PyTorch")
        from ..model.config import parse_variant
        from ..model.flops import PAPER_SIZE, count_flops
        from ..model.paper import ROWS

        rows = []
        for row in ROWS:
            stage(f"count {row.variant}")
            count = count_flops(parse_variant(row.variant), PAPER_SIZE)
            rows.append({"paper": row._asdict()} | count.to_dict())
    return rows


def _giga(number):
    return f"{number / 1e9:.2f}"


def _new_table(*headings):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    return table


def _print_count(model, count):
    table = _new_table("part", "GFLOPs, fvcore", "GFLOPs, all", "parameters, millions")
    for name, part in count["parts"].items():
        table.add_row(name, _giga(part["fvcore"]), _giga(part["all"]), f"{part['parameters'] / 1e6:.2f}")
    table.add_section()
    table.add_row("encoder", _giga(count["encoder"]["fvcore"]), _giga(count["encoder"]["all"]))
    table.add_row(
        "total",
        _giga(count["total"]["fvcore"]),
        _giga(count["total"]["all"]),
        f"{count['parameters'] / 1e6:.2f}",
        style="bold",
    )
    console = stdout_console()
    console.print(table)
    console.print(
        f"{model}: {count['variant']}, one image of {'x'.join(map(str, count['image_size']))}.  {_CONVENTIONS}",
        markup=False,
    )


def _print_table(rows):
    console = stdout_console()
    table = _new_table(
        "model", "paper", "fvcore", "diff.", "all", "paper, encoder", "fvcore", "diff.", "all", "params, M"
    )
    items = _new_table(
        "fvcore, by item", *(heading for heading, _ in _ITEMS), "for training", "rest of encoder", "other parts"
    )
    for row in rows:
        paper, total, encoder = row["paper"], row["total"], row["encoder"]
        table.add_row(
            row["variant"],
            str(paper["gflops"]),
            _giga(total["fvcore"]),
            f"{total['fvcore'] / 1e9 - paper['gflops']:+.1f}",
            _giga(total["all"]),
            str(paper["encoder_gflops"]),
            _giga(encoder["fvcore"]),
            f"{encoder['fvcore'] / 1e9 - paper['encoder_gflops']:+.1f}",
            _giga(encoder["all"]),
            f"{row['parameters'] / 1e6:.1f}",
        )
        training = sum(part["fvcore"] for name, part in row["parts"].items() if name.endswith("for training"))
        listed = [sum(row["encoder_items"].get(name, 0) for name in names) for _, names in _ITEMS]
        rest = encoder["fvcore"] - sum(listed)
        others = total["fvcore"] - encoder["fvcore"] - training
        items.add_row(row["variant"], *map(_giga, (*listed, training, rest, others)))
    console.print(table)
    console.print(items)
    console.print(_CONVENTIONS, markup=False)
    console.print(
        "The paper says that it does not count sampling, and its plain attention is a CUDA op that fvcore cannot see: "
        "'sampling' is what fvcore counts where the official code runs in PyTorch alone, as it always does for "
        "key-aware attention.  The encoders of DINO, H-DETR and their (6+1)x1 differ by what the value projections "
        "cost, and full-scale H-DETR outside its encoder by what is 'for training'; no one rule makes all of the "
        "paper's figures.",
        markup=False,
    )


# Headings for items of the encoder.
_ITEMS = (
    ("sampling", ("sampling and attention",)),
    ("values", ("value projections", "key projections")),
    ("queries", ("query projections or attention weights", "offsets")),
    ("FFN", ("feed-forward",)),
    ("light FFN", ("light feed-forward",)),
)
