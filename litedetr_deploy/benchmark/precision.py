"""What each precision costs and saves: one detector exported in all of them, with AP, size and latency side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx

from ..evaluate.data import Dataset
from ..evaluate.evaluate import Evaluation, evaluate
from ..evaluate.match import compare_detections
from ..export.export import export_onnx
from ..files import replaced_when_done
from ..model.detector import Detector
from ..model.session import TorchSession
from ..runtime.images import prepare
from ..runtime.session import OnnxSession
from ..verify.typed import float_twin
from . import timing
from .report import markdown_table

PACKAGES = ("litedetr-deploy", "torch", "onnxruntime", "onnx", "numpy")
COLUMNS = (
    "attention", "precision", "MB", "INT8 nodes", "half nodes", "casts", "AP", "AP lost", "score differs", "unmatched",
    "ms", "ratio", "verified",
)  # fmt: skip
HOW = (
    "'AP lost' is the AP of PyTorch in FP32 less this one's. The score differences are the largest between "
    "detections of the two that match (same label, IoU 0.5 or more, score 0.05 or more); 'unmatched' are those that "
    "do not, of both. The nodes are those that compute on INT8 or half values. Milliseconds are medians of one image "
    "in ONNX Runtime on the CPU, calls of all in turns, and 'ratio' is to the first; PyTorch is not timed here. ONNX "
    "Runtime's CPU lacks kernels for bfloat16: its AP is that of the same graph with every value rounded to bfloat16 "
    "and computed in FP32, and it has no time."
)


@dataclass
class Row:
    """One exported graph; times in seconds."""

    attention: str
    precision: str
    size_bytes: int
    nodes: dict[str, int]  # see ExportReport
    verified: bool
    ap: float
    ap_lost: float
    score_difference: float | None  # None where nothing matches
    unmatched: int
    median: float | None = None  # None where the runtime cannot run it


def measure(
    model: Detector,
    dataset: Dataset,
    folder: Path,
    precisions: Sequence[str],
    attentions: Sequence[str],
    image_size: tuple[int, int],
    calibration: Sequence,
    threads: int,
    seconds: float,
    progress: Callable[..., None] = lambda stage, done=0, total=None: None,
) -> tuple[Evaluation, list[Row]]:
    """Exports `model` into `folder` in every precision and attention; PyTorch's evaluation in FP32, and a row for each.

    calibration: pictures for INT8 (paths, PIL images or arrays).  seconds: of timed calls, for each.
    progress: as `evaluate` calls it.
    """
    options = {"image_size": image_size, "resize": "stretch", "progress": progress}
    base = evaluate(TorchSession(model, threads), dataset, **options)
    rows, sessions = [], {}
    for attention in attentions:
        for precision in precisions:
            path = folder / f"{attention}-{precision}.onnx"
            pictures = calibration if precision == "int8" else None
            report = export_onnx(
                model, path, attention, precision, image_size, calibration=pictures,
                progress=lambda stage, name=path.stem: progress(f"{name}: {stage}", 0, None),
            )  # fmt: skip
            if precision == "bf16":
                artifact = OnnxSession(float_twin(onnx.load(path)).SerializeToString(), threads=threads)
            else:
                artifact = path
                sessions[attention, precision] = OnnxSession(path, threads=threads)
            found = evaluate(artifact, dataset, threads=threads, **options)
            apart = compare_detections(base.detections, found.detections)
            ap = found.metrics["AP"]
            rows.append(
                Row(
                    attention, precision, report.size_bytes, report.nodes, report.passed, ap, base.metrics["AP"] - ap,
                    apart["score_difference"]["largest"], sum(apart["unmatched"]),
                )
            )  # fmt: skip
    medians = _time_in_turns(sessions, dataset, image_size, seconds, progress)
    for row in rows:
        row.median = medians.get((row.attention, row.precision))
    return base, rows


def _time_in_turns(sessions: dict, dataset: Dataset, image_size, seconds: float, progress) -> dict:
    """The median of every session, on the first image."""
    progress("time the graphs in turns", 0, None)
    pixels, _, size = prepare(dataset.load(dataset.images[0]), "stretch", image_size)
    feed = {"images": pixels[None], "orig_target_sizes": np.array([size], np.int64)}
    calls = {
        key: lambda session=session: timing.time_call(lambda: session.run(feed)) for key, session in sessions.items()
    }
    taken = {key: [] for key in calls}
    for key in timing.interleave({key: timing.repetitions(call, seconds) for key, call in calls.items()}):
        taken[key].append(calls[key]())
    return {key: timing.percentile(samples, 50) for key, samples in taken.items()}


def table_rows(base: Evaluation, rows: Sequence[Row]) -> list[list[str]]:
    first = next((row.median for row in rows if row.median), None)
    table = [["PyTorch", "fp32", *["-"] * 4, f"{base.metrics['AP']:.4f}", *["-"] * 6]]
    for row in rows:
        nodes = [str(row.nodes[kind]) for kind in ("int8", "half", "casts")]
        score = "-" if row.score_difference is None else f"{row.score_difference:.4f}"
        speed = [f"{row.median * 1e3:.1f}", f"{row.median / first:.2f}"] if row.median else ["-", "-"]
        table.append([
            row.attention, row.precision, f"{row.size_bytes / 1e6:.1f}", *nodes, f"{row.ap:.4f}", f"{row.ap_lost:+.4f}",
            score, str(row.unmatched), *speed, "yes" if row.verified else "NO",
        ])  # fmt: skip
    return table


def write_reports(base: Evaluation, rows: Sequence[Row], title: str, output: Path) -> list[Path]:
    """Writes `output`.json and .md, both or none; returns their paths."""
    machine = timing.machine(PACKAGES)
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    lines = [
        "# Precisions", "", f"{title}. {machine['cpu']}, {machine['cores']} cores; {machine['os']}; {packages}; "
        f"{machine['date']}.", "", HOW, "", *markdown_table(COLUMNS, table_rows(base, rows)),
    ]  # fmt: skip
    contents = {
        "benchmark": "precision", "title": title, "machine": machine, "pytorch": base.to_dict(),
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    paths = [output.with_name(output.name + ending) for ending in (".json", ".md")]
    with ExitStack() as stack:
        data, text = (stack.enter_context(replaced_when_done(path)) for path in paths)
        data.write_text(json.dumps(contents, indent=2) + "\n")
        text.write_text("\n".join(lines) + "\n")
    return paths
