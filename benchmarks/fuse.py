"""What `litedetr fuse` gains: detectors of transformers with random weights, before and after, timed in turns.

    python -m benchmarks.fuse FOLDER

exports each to FOLDER, fuses it, times both with one thread and with two, and prints a table in Markdown.  What is in
FOLDER already is taken from there.  Run it on a quiet machine.
"""

import json
import sys
from pathlib import Path

import numpy as np
import transformers

import litedetr_deploy as ld
from litedetr_deploy.cli import main
from tests.fuse import zoo


def deformable_detr():
    backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(backbone_config=backbone, two_stage=True, with_box_refine=True)
    return transformers.DeformableDetrForObjectDetection(config)


def mask2former():
    return transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig())


def rt_detr():
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig())


def d_fine():
    return transformers.DFineForObjectDetection(transformers.DFineConfig())


def lw_detr():
    return transformers.LwDetrForObjectDetection(transformers.LwDetrConfig(projector_scale_factors=[1.0]))


MODELS = {  # title, (height, width), model
    "deformable_detr": ("Deformable DETR R50, two-stage", (800, 1333), deformable_detr),
    "mask2former": ("Mask2Former Swin-S", (640, 640), mask2former),
    "rt_detr": ("RT-DETR R50", (640, 640), rt_detr),
    "d_fine": ("D-FINE", (640, 640), d_fine),
    "lw_detr": ("LW-DETR", (640, 640), lw_detr),
}
THREADS = (1, 2)
ATTENTION = "sampling_offsets|attention_weights"  # which begin as zeros, and would not tell right from wrong


def files(folder: Path, name: str) -> tuple[Path, Path]:
    """Return a model's file before and after, which are made where they are missing."""
    _, size, model = MODELS[name]
    original, fused = folder / f"{name}.onnx", folder / f"{name}-fused.onnx"
    if not original.is_file():
        wrapped = zoo.Wrapped(name, zoo.randomised(model(), ATTENTION)).eval()
        # With a fixed batch TorchScript leaves grids in float64, which ONNX Runtime does not load.
        zoo.write(original, wrapped, size, batch=True)
    if not fused.is_file():  # one image: the batches that it would be compared on otherwise take minutes
        ld.fuse_onnx(original, fused, inputs={"images": np.random.default_rng(0).random((1, 3, *size), np.float32)})
    return original, fused


def measure(folder: Path, name: str) -> tuple[int, dict[int, list[float]]]:
    """Return how many attentions of a model are fused, and by threads the medians before and after, milliseconds."""
    original, fused = files(folder, name)
    report, size = folder / f"{name}-latency", "x".join(map(str, MODELS[name][1]))
    options = ["--unchecked", "--threads", ",".join(map(str, THREADS)), "--image-size", size]
    try:
        main(["benchmark", "latency", str(original), str(fused), *options, "-o", str(report)])
    except SystemExit as ended:
        if ended.code:
            raise
    rows = json.loads(report.with_suffix(".json").read_text())["results"]
    regions = json.loads(fused.with_suffix(".json").read_text())["regions"]
    return len(regions), {count: [row["median_ms"] for row in rows if row["threads"] == count] for count in THREADS}


def print_table(folder: Path) -> None:
    print(
        "| model | image | attentions fused | one thread, ms | two threads, ms |", "|---|---|---:|---:|---:|", sep="\n"
    )
    for name, (title, (height, width), _) in MODELS.items():
        regions, medians = measure(folder, name)
        cells = [f"{before:.0f} to {after:.0f} ({before / after:.2f}x)" for before, after in medians.values()]
        print(f"| {title} | {height}x{width} | {regions} |", " | ".join(cells), "|")


if __name__ == "__main__":
    print_table(Path(sys.argv[1]))
