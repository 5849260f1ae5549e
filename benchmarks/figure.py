"""Draws what detectors cost, GFLOPs and milliseconds by part: the README's picture, from a report of latency.py.

python benchmarks/figure.py benchmarks/results/latency-variants.json docs/cost.png
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the package as it lies here, where none is installed

from matplotlib.figure import Figure

from litedetr_deploy.benchmark.parts import BACKBONE, DECODER, ENCODER, HEADS
from litedetr_deploy.benchmark.report import COLOURS
from litedetr_deploy.files import replaced_when_done
from litedetr_deploy.model.config import parse_variant
from litedetr_deploy.model.flops import count_flops

IMAGE_SIZE, THREADS = (800, 1333), 1
SHOWN = {BACKBONE: "backbone", ENCODER: "encoder", DECODER: "decoder and heads", HEADS: "decoder and heads"}
REST = "the rest"


def main(report: Path, picture: Path) -> None:
    contents = json.loads(report.read_text())
    results = [row for row in contents["results"] if row["status"] == "measured"
               and (tuple(row["image_size"]), row["threads"]) == (IMAGE_SIZE, THREADS)]  # fmt: skip
    flops, times = [], []
    for row in results:
        parts = count_flops(parse_variant(row["variant"]), IMAGE_SIZE).parts()
        flops.append(grouped({name: part["fvcore"] / 1e9 for name, part in parts.items()}))
        times.append(grouped(row["parts_ms"]))

    figure = Figure(figsize=(11, 0.9 + 0.5 * len(results)), layout="constrained")
    for axes, bars, label in zip(
        figure.subplots(1, 2, sharey=True), (flops, times), ("GFLOPs, as the paper counts", "milliseconds, one thread")
    ):
        draw_bars(axes, bars)
        axes.set_xlabel(label)
    axes.set_yticks(range(len(results)), [row["variant"] for row in results])
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    with replaced_when_done(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def grouped(parts: dict[str, float]) -> dict[str, float]:
    """The parts that are shown, in their order; a part's name can go on after theirs, as in 'encoder, layer 1'."""
    sums = dict.fromkeys((*SHOWN.values(), REST), 0.0)
    for name, value in parts.items():
        sums[next((shown for start, shown in SHOWN.items() if name.startswith(start)), REST)] += value
    return sums


def draw_bars(axes, bars: list[dict[str, float]]) -> None:
    for place, parts in enumerate(bars):
        start = 0.0
        for colour, (name, value) in zip(COLOURS, parts.items()):
            axes.barh(place, value, 0.66, left=start, color=colour, label=None if place else name)
            if value > 0.06 * max(sum(one.values()) for one in bars):
                axes.text(start + value / 2, place, f"{value:.0f}", ha="center", va="center", color="white", fontsize=8)
            start += value
        axes.annotate(f"{start:.0f}", (start, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
