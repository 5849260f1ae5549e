"""Go the whole way on this machine: export the detector that comes with the package, verify it, run it on generated
scenes, and measure its AP and latency."""

import subprocess
import sys
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import litedetr_deploy as ld
from litedetr_deploy.assets.shapes import SIZE
from litedetr_deploy.evaluate.data import drawn_shapes
from litedetr_deploy.evaluate.evaluate import evaluate
from litedetr_deploy.runtime.draw import draw, save

DETECTOR = "lite-dino-shapes"
FOLDER = Path("demo")
SCENES_SHOWN = (3, 2)  # columns, rows
THRESHOLD = 0.4
SCENES_MEASURED = 200


def main():
    FOLDER.mkdir(exist_ok=True)
    models = {attention: FOLDER / f"{DETECTOR}-{attention}.onnx" for attention in ("op", "gather")}
    for attention, path in models.items():
        run("litedetr-export", DETECTOR, "-o", path, "--image-size", f"{SIZE}x{SIZE}", "--attention", attention)

    dataset = drawn_shapes(SCENES_MEASURED)
    sheet = FOLDER / "detections.jpg"
    save(contact_sheet(ld.Detector(models["op"]), dataset), sheet)

    table = Table("", "AP", "AP50", "ms an image", title=f"{SCENES_MEASURED} generated scenes of {SIZE}x{SIZE}")
    with Progress(console=Console(stderr=True)) as progress:
        for name, artifact in {
            "ONNX Runtime, fused op": models["op"],
            "ONNX Runtime, gathers": models["gather"],
            "PyTorch, fused op": DETECTOR,
        }.items():
            task = progress.add_task(name, total=None)
            report = evaluate(
                artifact,
                dataset,
                progress=lambda _, done, total, task=task: progress.update(task, completed=done, total=total),
            )
            metrics, latency = report.metrics, report.latency_ms["median"]
            table.add_row(name, f"{metrics['AP']:.3f}", f"{metrics['AP50']:.3f}", f"{latency:.1f}")
    Console().print(table)
    print(f"The models: {', '.join(map(str, models.values()))}\nThe image: {sheet}")


def contact_sheet(detector, dataset) -> Image.Image:
    """Return some scenes with the boxes that `detector` finds, side by side."""
    columns, rows = SCENES_SHOWN
    sheet = Image.new("RGB", (columns * SIZE, rows * SIZE))
    scenes = [dataset.load(entry) for entry in dataset.images[: columns * rows]]
    for place, (scene, found) in enumerate(zip(scenes, detector.predict(scenes, threshold=THRESHOLD))):
        sheet.paste(draw(scene, found), (place % columns * SIZE, place // columns * SIZE))
    return sheet


def run(command, *arguments):
    """Run a command of this package as a user types it; end with its exit status where it fails."""
    print("$", command, *arguments, flush=True)
    status = subprocess.run([Path(sys.executable).parent / command, *map(str, arguments)]).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
