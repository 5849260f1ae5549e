"""The README's chart, GFLOPs and milliseconds by part: python benchmarks/figure.py REPORT.json docs/cost.png."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the package as it lies here, where none is installed

from matplotlib.figure import Figure

from litedetr_deploy.benchmark.gflops import count
from litedetr_deploy.benchmark.parts import BACKBONE, DECODER, ENCODER, HEADS
from litedetr_deploy.benchmark.report import COLOURS, draw_bars
from litedetr_deploy.files import replaced_when_done

IMAGE_SIZE, THREADS = (800, 1333), 1
SHOWN = {BACKBONE: "backbone", ENCODER: "encoder", DECODER: "decoder and heads", HEADS: "decoder and heads"}
REST = "the rest"


def main(report: Path, chart: Path) -> None:
    rows = [row for row in json.loads(report.read_text())["results"] if row["status"] == "measured"
            and (tuple(row["image_size"]), row["threads"]) == (IMAGE_SIZE, THREADS)]  # fmt: skip
    flops = [grouped({name: part["fvcore"] / 1e9 for name, part in count(row["variant"], IMAGE_SIZE)["parts"].items()})
             for row in rows]  # fmt: skip
    times = [grouped(row["parts_ms"]) for row in rows]

    figure = Figure(figsize=(11, 0.9 + 0.5 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colours = dict(zip(flops[0], COLOURS))
    for axes, bars, label in zip(panels, (flops, times), ("GFLOPs, as the paper counts", "milliseconds, one thread")):
        draw_bars(axes, [row["variant"] for row in rows], bars, colours)
        axes.set_xlabel(label)
    panels[1].invert_yaxis()  # they share it, and both have turned it
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    with replaced_when_done(chart) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def grouped(parts: dict[str, float]) -> dict[str, float]:
    """The parts that are shown, in their order; a part's name can go on after theirs, as in 'encoder, layer 1'."""
    sums = dict.fromkeys((*SHOWN.values(), REST), 0.0)
    for name, value in parts.items():
        sums[next((shown for start, shown in SHOWN.items() if name.startswith(start)), REST)] += value
    return sums


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
