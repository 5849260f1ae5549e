"""Writes generated scenes as a dataset in COCO's layout.

    python examples/shapes/make_dataset.py shapes          # the validation set
    python examples/shapes/make_dataset.py shapes --count 2000 --seed 7 --size 480x640

FOLDER then holds val/000000.png, val/000001.png, ... and annotations/instances_val.json.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from litedetr_deploy.assets.shapes import SIZE, VALIDATION_COUNT, VALIDATION_SEED, coco_annotations, scene
from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.files import replaced_when_done


def main(
    folder: Annotated[Path, typer.Argument(help="Where the dataset goes; made if it does not exist.")],
    count: Annotated[int, typer.Option(min=1, help="How many scenes.")] = VALIDATION_COUNT,
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes.")] = VALIDATION_SEED,
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of every scene in pixels.")] = f"{SIZE}x{SIZE}",
):
    """Write COUNT scenes and their annotations to FOLDER."""
    try:
        make_dataset(folder, count, seed, size)
    except (LiteDetrError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def make_dataset(folder, count, seed, size):
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if not match:
        raise LiteDetrError(f"The size is {size!r}; it must be HEIGHTxWIDTH in pixels, as in 480x640.")
    size = int(match[1]), int(match[2])
    scene(0, seed, size)  # a size that cannot be is reported before anything is written
    pictures, annotations = folder / "val", folder / "annotations"
    for made in (pictures, annotations):
        made.mkdir(parents=True, exist_ok=True)

    objects = []
    for index in track(range(count), "draw scenes", console=Console(stderr=True)):
        image, boxes, labels = scene(index, seed, size)
        with replaced_when_done(pictures / f"{index:06}.png") as temporary:
            image.save(temporary, "PNG")
        objects.append((boxes, labels))
    file = annotations / "instances_val.json"
    with replaced_when_done(file) as temporary:
        temporary.write_text(json.dumps(coco_annotations(objects, size)))
    print(f"{count} scenes of {size[0]}x{size[1]} with {sum(len(labels) for _, labels in objects)} objects: {file}")


if __name__ == "__main__":
    typer.run(main)
