"""What each precision costs and saves: one detector exported in all of them, with AP, size and latency side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..artifact import FAILED, VERIFIED, load_onnx
from ..evaluate.data import Dataset
from ..evaluate.evaluate import Evaluation, Options, evaluate
from ..evaluate.match import compare_detections
from ..export.export import export_onnx
from ..export.limits import INT8_ON_CPU, Int8, split
from ..machine import computes_bfloat16, installed_version
from ..model.deployed import TorchSession
from ..model.detector import Detector
from ..runtime.images import prepare
from ..runtime.session import OnnxSession, open_session
from ..verify.typed import float_twin
from . import harness, report, timing

PACKAGES = ("litedetr-deploy", "torch", "onnxruntime", "openvino", "onnx", "numpy")
COLUMNS = (
    "attention", "precision", "runs in", "MB", "INT8 nodes", "half nodes", "casts", "AP", "AP lost", "score differs",
    "unmatched", "ms", "ratio", "verified",
)  # fmt: skip
HOW = (
    "'AP lost' is PyTorch's in FP32 less this one's; 'score differs' is the largest difference of detections that "
    "match (label, IoU 0.5, score 0.05), 'unmatched' are those that do not, of both; milliseconds are medians of one "
    "image on the CPU. ONNX Runtime lacks bfloat16 kernels: that AP is computed in FP32 from rounded values. "
    f"{INT8_ON_CPU!r} is INT8 with --target cpu; all but it and fp32 are for GPUs."
)


class _Session(harness.Contender):
    """An exported graph in this process, checked by its export."""

    def __init__(self, row: dict, session, feed: dict[str, np.ndarray]):
        self.name, self.subject = f"{row['attention']}-{row['precision']}-{row['runtime']}", row
        self._session, self._feed = session, feed

    def call(self):
        return self._session.run(self._feed)


def _runtimes(precision: str) -> dict[str, dict]:
    """Return what runs such a model on this CPU, by the name in the table, as options of `open_session`."""
    runtimes: dict[str, dict] = {"onnxruntime": {}}
    if precision in ("fp32", INT8_ON_CPU) and installed_version("openvino"):
        runtimes["openvino"] = {"runtime": "openvino"}
        if computes_bfloat16():
            runtimes["openvino bf16"] = {"runtime": "openvino", "precision": "bf16"}
    return runtimes


def measure(
    model: Detector, dataset: Dataset, folder: Path, precisions: Sequence[str], attentions: Sequence[str],
    image_size: tuple[int, int], calibration: Sequence, threads: int, seconds: float,
    progress: Callable[..., None] = lambda stage, done=0, total=None: None,
) -> tuple[Evaluation, list[dict]]:  # fmt: skip
    """Export `model` into `folder` in every precision and attention; return PyTorch's evaluation in FP32, and, as JSON
    types, the figures of each in every runtime that has kernels for it: `median` in seconds, None where none has.

    precisions: those of an export, and INT8_ON_CPU; calibration: images for INT8, as `Int8` takes them; seconds: of
    timed calls, for each; progress: as of `evaluate`.
    """

    def say(what: str) -> Callable[[str], None]:
        return lambda stage: progress(f"{what}: {stage}", 0, None)

    options = Options(image_size=image_size, resize="stretch", threads=threads)
    base = evaluate(TorchSession(model, threads), dataset, options, progress)
    pixels, _, size = prepare(dataset.load(dataset.images[0]), "stretch", image_size)
    feed = {"images": pixels[None], "orig_target_sizes": np.array([size], np.int64)}
    rows, contenders = [], []
    for attention, precision in itertools.product(attentions, precisions):
        path = folder / f"{attention}-{precision}.onnx"
        kind, target = split(precision)
        int8 = Int8(calibration) if kind == "int8" else None
        made = export_onnx(model, path, attention, kind, image_size, int8=int8, target=target, progress=say(path.stem))
        runs = precision != "bf16"
        artifact = path if runs else OnnxSession(float_twin(load_onnx(path)).SerializeToString(), threads=threads)
        for runtime, choices in _runtimes(precision).items():
            found = evaluate(artifact, dataset, replace(options, **choices), progress)
            apart = compare_detections(base.detections, found.detections)
            ap = found.metrics["AP"]
            rows.append({
                "attention": attention, "precision": precision, "runtime": runtime, "size_bytes": made.size_bytes,
                "nodes": made.nodes, "verified": made.passed, "verdict": made.verdict.status, "ap": ap,
                "ap_lost": base.metrics["AP"] - ap, "score_difference": apart["score_difference"]["largest"],
                "unmatched": sum(apart["unmatched"]), "median": None,
            })  # fmt: skip
            if runs:
                contenders.append(_Session(rows[-1], open_session(path, threads=threads, **choices), feed))
    settings = harness.Settings(seconds, at_once=len(contenders))
    for result in harness.measure(contenders, settings, say("time")):
        result.subject["median"] = result.median if result.seconds else None
    return base, rows


def as_dict(base: Evaluation, rows: Sequence[dict], title: str) -> dict:
    machine = timing.machine(PACKAGES)
    return {"benchmark": "precision", "title": title, "machine": machine, "pytorch": base.to_dict(), "rows": rows}


def table(contents: dict) -> list[str]:
    """Return the lines of the table of what `as_dict` gives."""
    rows = contents["rows"]
    first = next((row["median"] for row in rows if row["median"]), None)
    cells = [["-", "fp32", "PyTorch", *["-"] * 4, f"{contents['pytorch']['metrics']['AP']:.4f}", *["-"] * 6]]
    for row in rows:
        score = "-" if row["score_difference"] is None else f"{row['score_difference']:.4f}"
        speed = [f"{row['median'] * 1e3:.1f}", f"{row['median'] / first:.2f}"] if row["median"] else ["-", "-"]
        cells.append([
            row["attention"], row["precision"], row["runtime"], f"{row['size_bytes'] / 1e6:.1f}",
            *(str(row["nodes"][kind]) for kind in ("int8", "half", "casts")), f"{row['ap']:.4f}",
            f"{row['ap_lost']:+.4f}", score, str(row["unmatched"]), *speed,
            {VERIFIED: "yes", FAILED: "NO"}.get(row["verdict"], row["verdict"]),
        ])  # fmt: skip
    return report.table(COLUMNS, cells)


def write_reports(contents: dict, output: Path) -> list[Path]:
    """Write `output`.json and .md of what `as_dict` gives, both or none; return their paths."""
    machine = f"{contents['title']}. {report.machine_text(contents['machine'])}"
    return report.write(output, contents, ["# Precisions", "", machine, "", HOW, *table(contents)])
