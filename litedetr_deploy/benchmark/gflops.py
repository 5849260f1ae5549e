"""Operations and parameters of detectors, counted by part: the tables of `litedetr benchmark gflops`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .. import assets
from ..errors import LiteDetrError
from ..model.config import parse_variant
from ..model.paper import PUBLISHED
from . import report

CONVENTIONS = (
    "fvcore: as fvcore counts the official code, as in the paper; all: what this package runs, softmax, sums, "
    "activations and reductions counted too.  The unit of both is one multiply-add.  More: docs/benchmarks.md."
)
ITEMS = {  # of the encoder, by their headings
    "sampling": ("sampling and attention",),
    "values": ("value projections", "key projections"),
    "queries": ("query projections or attention weights", "offsets"),
    "FFN": ("feed-forward",),
    "light FFN": ("light feed-forward",),
}


def count(
    model: str, image_size: tuple[int, int] | None = None, variant: str | None = None, force_variant: bool = False
) -> dict:
    """Return the counts of a variant, a checkpoint (as `load_model` takes it) or an .onnx model, as `FlopCount.to_dict`
    has them, for images of the paper's size, or of the ONNX model's own, when none is given."""
    from ..model.flops import PAPER_SIZE, count_flops

    if Path(model).suffix == ".onnx":
        from ..model.onnx_flops import count_onnx_flops

        return count_onnx_flops(model, image_size).to_dict()
    if model in assets.NAMES or Path(model).exists():
        from ..model.checkpoints import load_model

        config = load_model(model, variant, force_variant).config
    elif variant:
        raise LiteDetrError(f"The checkpoint {model} does not exist. Check the path, or give the variant alone.")
    else:
        config = parse_variant(model)
    return count_flops(config, image_size or PAPER_SIZE).to_dict()


def count_published(progress: Callable[[str], None]) -> list[dict]:
    """Return the models of the paper's tables with our counts beside them."""
    rows = []
    for model in PUBLISHED:
        progress(f"count {model.variant}")
        rows.append({"paper": model._asdict()} | count(model.variant))
    return rows


def count_table(model: str, found: dict) -> list[str]:
    parts = found["parts"] | {"encoder, all of it": found["encoder"]}
    parts["total"] = found["total"] | {"parameters": found["parameters"]}
    rows = [
        [name, _giga(part["fvcore"]), _giga(part["all"]),
         f"{part['parameters'] / 1e6:.2f}" if "parameters" in part else ""]
        for name, part in parts.items()
    ]  # fmt: skip
    size = "x".join(map(str, found["image_size"]))
    columns = ("part", "GFLOPs, fvcore", "GFLOPs, all", "parameters, millions")
    return [*report.table(columns, rows), "", f"{model}: {found['variant']}, one image of {size}.  {CONVENTIONS}"]


def published_table(rows: list[dict]) -> list[str]:
    totals, items = [], []
    for row in rows:
        paper, encoder, whole = row["paper"], row["encoder"], row["total"]
        cells = [row["variant"]]
        for published, ours in ((paper["gflops"], whole), (paper["encoder_gflops"], encoder)):
            difference = f"{ours['fvcore'] / 1e9 - published:+.1f}"
            cells += [str(published), _giga(ours["fvcore"]), difference, _giga(ours["all"])]
        totals.append([*cells, f"{row['parameters'] / 1e6:.1f}"])
        training = sum(part["fvcore"] for name, part in row["parts"].items() if name.endswith("for training"))
        listed = [sum(row["encoder_items"].get(name, 0) for name in names) for names in ITEMS.values()]
        rest = encoder["fvcore"] - sum(listed), whole["fvcore"] - encoder["fvcore"] - training
        items.append([row["variant"], *map(_giga, (*listed, training, *rest))])
    columns = ("model", "paper", "fvcore", "diff.", "all", "paper, encoder", "fvcore", "diff.", "all", "params, M")
    headings = ("fvcore, by item", *ITEMS, "for training", "rest of encoder", "other parts")
    return [*report.table(columns, totals), *report.table(headings, items), "", CONVENTIONS]


def _giga(number: float) -> str:
    return f"{number / 1e9:.2f}"
