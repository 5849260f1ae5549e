"""Compare Lite detectors with their full-scale twin: AP with bootstrap intervals, GFLOPs and latency, and a figure.

    litedetr benchmark latency dino-r26n lite-dino-r26n --image-size 256 --backends onnxruntime-op -o latency
    python examples/shapes/compare.py full=runs/full/model.safetensors lite=runs/lite/model.safetensors \
        --latency latency.json --output lite-against-full

The first model is the one that the others are compared with.  All see the same scenes, and every resample of the
bootstrap draws the same scenes for all of them: the interval of a ratio is that of the ratio, not of two APs.
"""

from __future__ import annotations

import itertools
import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from litedetr_deploy import __version__
from litedetr_deploy.assets.shapes import SIZE
from litedetr_deploy.benchmark import report
from litedetr_deploy.benchmark.gflops import count as count_flops
from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.evaluate.average_precision import matched
from litedetr_deploy.evaluate.data import drawn_shapes
from litedetr_deploy.evaluate.evaluate import evaluate
from litedetr_deploy.machine import describe_cpu

AREAS = ("AP", "AP_small", "AP_medium", "AP_large")  # in COCOeval's order
LEVEL = 0.95  # of the intervals
BACKEND = "onnxruntime-op"  # whose latency is shown


class Resampled:
    """AP of one detector on resampled scenes, as COCOeval computes it where scenes are there several times."""

    def __init__(self, evaluation):
        """evaluation: COCOeval with its `evalImgs`."""
        parameters = evaluation.params
        self.recalls, images = parameters.recThrs, len(parameters.imgIds)
        sets = np.array(evaluation.evalImgs, object).reshape(len(parameters.catIds), len(AREAS), images)
        self.sets = [[self._set(by_image) for by_image in by_area] for by_area in sets]

    @staticmethod
    def _set(by_image):
        """Return image, true and false positives of the detections, best first, [D], [T, D], [T, D], for the T overlaps
        of COCO, and the number of objects in every image."""
        found = [(i, one) for i, one in enumerate(by_image) if one is not None]
        objects = np.zeros(len(by_image))
        for i, one in found:
            objects[i] = np.count_nonzero(np.asarray(one["gtIgnore"]) == 0)
        if not found:
            return np.zeros(0, int), np.zeros((10, 0)), np.zeros((10, 0)), objects
        image = np.concatenate([np.full(len(one["dtScores"]), i) for i, one in found])
        scores = np.concatenate([one["dtScores"] for _, one in found])
        matches = np.concatenate([one["dtMatches"] for _, one in found], 1) != 0
        ignored = np.concatenate([one["dtIgnore"] for _, one in found], 1) != 0
        order = np.argsort(-scores, kind="mergesort")
        order = order[~ignored[:, order].all(0)]  # what no overlap counts
        return image[order], (matches & ~ignored)[:, order], (~matches & ~ignored)[:, order], objects

    def __call__(self, times: np.ndarray) -> np.ndarray:
        """Return AREAS, NaN where there is no object of that size; times [images], how often each image is there."""
        result = []
        for area in range(len(AREAS)):
            values = []
            for image, true, false, objects in (by_area[area] for by_area in self.sets):
                if (total := objects @ times) > 0:
                    weight = times[image]
                    hits = np.cumsum(true * weight, 1)
                    precision = hits / np.maximum(hits + np.cumsum(false * weight, 1), np.spacing(1))
                    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
                    for row, recall in zip(precision, hits / total):
                        places = np.searchsorted(recall, self.recalls)
                        values.append(np.append(row, 0)[places].mean())
            result.append(np.mean(values) if values else np.nan)
        return np.array(result)


def resample(models: list[Resampled], images: int, times: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return APs [models, AREAS] and of `times` resamples, the same for all, [times, models, AREAS]."""
    generator = np.random.default_rng(seed)
    measured = np.stack([model(np.ones(images)) for model in models])
    draws = [np.bincount(generator.integers(0, images, images), minlength=images).astype(float) for _ in range(times)]
    steps = track(draws, "resample", console=Console(stderr=True))
    return measured, np.stack([[model(draw) for model in models] for draw in steps])


def interval(values: np.ndarray) -> list[float]:
    return np.nanquantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()


def main(
    models: Annotated[list[str], typer.Argument(help="NAME=CHECKPOINT of each; first the one to compare with.")],
    output: Annotated[Path, typer.Option(help="Writes OUTPUT.json, OUTPUT.md and OUTPUT.png.")],
    latency: Annotated[Path | None, typer.Option(help="Report of `litedetr benchmark latency` on them.")] = None,
    scenes: Annotated[int, typer.Option(min=2, help="How many validation scenes.")] = 1000,
    resamples: Annotated[int, typer.Option(min=20, help="Of the bootstrap.")] = 1000,
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU, for AP.")] = 2,
):
    """Measure and compare MODELS on generated scenes."""
    try:
        compare(models, output, latency, scenes, resamples, threads)
    except LiteDetrError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_status) from None


def compare(models, output, latency, scenes, resamples, threads):
    named = [model.partition("=")[::2] for model in models]
    if wrong := [model for model, (_, file) in zip(models, named) if not file]:
        raise LiteDetrError(
            f"{wrong[0]!r} is not a model to compare. Give NAME=CHECKPOINT, as in full=model.safetensors."
        )
    times = json.loads(latency.read_text())["results"] if latency else []
    dataset = drawn_shapes(scenes)
    console, rows, resampled = Console(stderr=True), [], []
    for name, file in named:
        console.print(f"evaluate {name}: {file}", highlight=False, markup=False)
        found = evaluate(file, dataset, threads=threads)
        resampled.append(Resampled(matched(dataset, found.detections)))
        flops = count_flops(file, (SIZE, SIZE))
        time = [x for x in times if (x["variant"], x["backend"], x["threads"]) == (flops["variant"], BACKEND, 1)]
        rows.append(
            {
                "name": name,
                "variant": flops["variant"],
                "metrics": found.metrics,
                "gflops": flops["total"]["fvcore"] / 1e9,
                "encoder_gflops": flops["encoder"]["fvcore"] / 1e9,
                "latency_ms": time[0]["median_ms"] if time else None,
                "encoder_ms": time[0]["encoder_ms"] if time else None,
            }
        )
    measured, drawn = resample(resampled, scenes, resamples)
    for i, row in enumerate(rows):
        for j, area in enumerate(AREAS):
            ratios = drawn[:, i, j] / drawn[:, 0, j]
            row[area] = {"value": measured[i, j], "interval": interval(drawn[:, i, j])}
            row[area] |= {"ratio": measured[i, j] / measured[0, j], "ratio_interval": interval(ratios)}
    contents = {
        "scenes": scenes, "objects": len(dataset.annotations), "resamples": resamples, "level": LEVEL,
        "tool_version": __version__, "cpu": describe_cpu(),
        "date": datetime.now(timezone.utc).isoformat("T", "seconds"),
        "latency": latency.name if latency else None, "models": rows,
    }  # fmt: skip
    lines = text(contents)
    paths = report.write(output, contents, lines, lambda path: draw(rows, path))
    print("\n".join([*lines, "", ", ".join(map(str, paths))]))


def text(contents: dict) -> list[str]:
    rows = contents["models"]

    def span(low, high):
        return f"{low:.3f} to {high:.3f}"

    columns = ("encoder", "AP", "of that of " + rows[0]["name"], f"{contents['level']:.0%} interval", "AP50")
    aps = [
        [row["name"], f"{row['AP']['value']:.3f}", f"{row['AP']['ratio']:.3f}", span(*row["AP"]["ratio_interval"]),
         f"{row['metrics']['AP50']:.3f}"]
        for row in rows
    ]  # fmt: skip
    by_size = [
        [row["name"], *(f"{row[area]['value']:.3f} ({row[area]['ratio']:.3f}: {span(*row[area]['ratio_interval'])})"
                        for area in AREAS[1:])]
        for row in rows
    ]  # fmt: skip
    costs = [
        [row["name"], row["variant"], f"{row['gflops']:.2f}", f"{row['encoder_gflops']:.2f}",
         *(report.three_digits(row[key]) for key in ("latency_ms", "encoder_ms"))]
        for row in rows
    ]  # fmt: skip
    note = (
        f"{contents['scenes']} validation scenes with {contents['objects']} objects.  Intervals are of "
        f"{contents['resamples']} resamples of the scenes, the same for all models."
    )
    cost_columns = ("encoder", "variant", "GFLOPs", "of the encoder", "ms", "of the encoder")
    if contents["latency"]:
        note += f"  Times of one image in ONNX Runtime with our op, one thread: {contents['latency']}."
    return [
        "# Lite against full scale",
        *report.table(columns, aps),
        *report.table(("by size (ratio: interval)", "small", "medium", "large"), by_size),
        *report.table(cost_columns, costs),
        "",
        note,
    ]


def draw(rows: list[dict], path: Path) -> None:
    """AP against GFLOPs, as the paper's figure 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label in zip(panels, ("gflops", "encoder_gflops"), ("GFLOPs", "GFLOPs of the encoder")):
        for row, colour in zip(rows, itertools.cycle(report.COLOURS)):
            low, high = row["AP"]["interval"]
            value = row["AP"]["value"]
            axes.errorbar(row[key], value, [[value - low], [high - value]], fmt="o", color=colour, label=row["name"])
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        report.tidy(axes, "both")
    panels[0].set_ylabel(f"AP, with its {LEVEL:.0%} interval")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8)
    figure.savefig(path, format="png", dpi=120)


if __name__ == "__main__":
    typer.run(main)
