"""The options that several commands have, each said once."""

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    str,
    typer.Argument(
        help="Trained weights: .pth, .pt or .safetensors; or the name of those that come with this package, "
        "lite-dino-shapes."
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(help="What the checkpoint holds, as in lite-dino-r50-h3l1-2+1x3; by default what the file says."),
]
ForceVariant = Annotated[
    bool,
    typer.Option("--force-variant", help="Take --variant although the checkpoint says otherwise; this is recorded."),
]
Images = Annotated[
    list[Path] | None,
    typer.Option(help="Image, or directory of images, to verify with; can be repeated.  Not given: drawn scenes."),
]
ImageSize = Annotated[
    str,
    typer.Option(
        "--image-size",
        "--image-sizes",
        metavar="SIZE",
        help="Input size in pixels: HEIGHTxWIDTH, one number for a square, or 'dynamic'.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="COCO folder, with annotations/instances_val2017.json and val2017 (or instances_val.json and val); or the "
        "annotation file itself."
    ),
]
Shapes = Annotated[bool, typer.Option("--shapes", help="Take the drawn shapes, which need no files, as the data.")]
Count = Annotated[int | None, typer.Option(min=1, help="Take the first images only, this many.")]
Resize = Annotated[
    str | None,
    typer.Option(
        help="How an image becomes the model's input: shortest_edge, stretch or letterbox; by default what the model "
        "was exported for."
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads, at most one a logical core; by default one a core.")
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not verify what is made.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print the whole table of the verification.")]
