"""What each precision costs and saves: one detector exported in all of them, with AP, size and latency side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..artifact import FAILED, VERIFIED, load_onnx
from ..evaluate.data import Dataset
from ..evaluate.evaluate import Evaluation, Options, evaluate
from ..evaluate.match import compare_detections
from ..export.export import export_onnx
from ..export.limits import Int8
from ..model.deployed import TorchSession
from ..model.detector import Detector
from ..runtime.images import prepare
from ..runtime.session import OnnxSession
from ..verify.typed import float_twin
from . import harness, report, timing

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
class Exported:
    """One exported graph; times in seconds."""

    attention: str
    precision: str
    size_bytes: int
    nodes: dict[str, int]  # see ExportReport
    verified: bool
    verdict: str  # see `Verdict.status`
    ap: float
    ap_lost: float
    score_difference: float | None  # None where nothing matches
    unmatched: int
    median: float | None = None  # None where the runtime cannot run it


class _Session(harness.Contender):
    """An exported graph in this process, checked by its export."""

    def __init__(self, exported: Exported, session: OnnxSession, feed: dict[str, np.ndarray]):
        self.name, self.subject = f"{exported.attention}-{exported.precision}", exported
        self._session, self._feed = session, feed

    def call(self):
        return self._session.run(self._feed)


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
) -> tuple[Evaluation, list[Exported]]:
    """Export `model` into `folder` in every precision and attention; return PyTorch's evaluation in FP32, and them.

    calibration: images for INT8, as `Int8` takes them.  seconds: of timed calls, for each.
    progress: as `evaluate` calls it.
    """
    options = Options(image_size=image_size, resize="stretch", threads=threads)
    base = evaluate(TorchSession(model, threads), dataset, options, progress)
    pixels, _, size = prepare(dataset.load(dataset.images[0]), "stretch", image_size)
    feed = {"images": pixels[None], "orig_target_sizes": np.array([size], np.int64)}
    graphs, contenders = [], []
    for attention, precision in ((attention, precision) for attention in attentions for precision in precisions):
        path = folder / f"{attention}-{precision}.onnx"
        say = functools.partial(_say, progress, path.stem)
        int8 = Int8(calibration) if precision == "int8" else None
        made = export_onnx(model, path, attention, precision, image_size, int8=int8, progress=say)
        runs = precision != "bf16"
        artifact = path if runs else OnnxSession(float_twin(load_onnx(path)).SerializeToString(), threads=threads)
        found = evaluate(artifact, dataset, options, progress)
        apart = compare_detections(base.detections, found.detections)
        ap = found.metrics["AP"]
        graph = Exported(
            attention, precision, made.size_bytes, made.nodes, made.passed, made.verdict.status, ap,
            base.metrics["AP"] - ap, apart["score_difference"]["largest"], sum(apart["unmatched"]),
        )  # fmt: skip
        graphs.append(graph)
        if runs:
            contenders.append(_Session(graph, OnnxSession(path, threads=threads), feed))
    settings = harness.Settings(seconds, at_once=len(contenders))
    for result in harness.measure(contenders, settings, functools.partial(_say, progress, "time")):
        result.subject.median = result.median if result.seconds else None
    return base, graphs


def _say(progress: Callable[..., None], what: str, stage: str) -> None:
    progress(f"{what}: {stage}", 0, None)


def table(base: Evaluation, graphs: Sequence[Exported]) -> list[str]:
    first = next((graph.median for graph in graphs if graph.median), None)
    rows = [["PyTorch", "fp32", *["-"] * 4, f"{base.metrics['AP']:.4f}", *["-"] * 6]]
    for graph in graphs:
        nodes = [str(graph.nodes[kind]) for kind in ("int8", "half", "casts")]
        score = "-" if graph.score_difference is None else f"{graph.score_difference:.4f}"
        speed = [f"{graph.median * 1e3:.1f}", f"{graph.median / first:.2f}"] if graph.median else ["-", "-"]
        verified = {VERIFIED: "yes", FAILED: "NO"}.get(graph.verdict, graph.verdict)
        rows.append([
            graph.attention, graph.precision, f"{graph.size_bytes / 1e6:.1f}", *nodes, f"{graph.ap:.4f}",
            f"{graph.ap_lost:+.4f}", score, str(graph.unmatched), *speed, verified,
        ])  # fmt: skip
    return report.table(COLUMNS, rows)


def as_dict(base: Evaluation, graphs: Sequence[Exported], title: str) -> dict:
    return {
        "benchmark": "precision", "title": title, "machine": timing.machine(PACKAGES), "pytorch": base.to_dict(),
        "rows": [asdict(graph) for graph in graphs],
    }  # fmt: skip


def write_reports(base: Evaluation, graphs: Sequence[Exported], title: str, output: Path) -> list[Path]:
    """Write `output`.json and .md, both or none; return their paths."""
    contents = as_dict(base, graphs, title)
    machine = report.machine_text(contents["machine"])
    return report.write(output, contents, ["# Precisions", "", f"{title}. {machine}", "", HOW, *table(base, graphs)])
