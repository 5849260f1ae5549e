"""Checks of arguments that cost nothing, so that they come before torch is imported and before minutes of work."""

import re
from pathlib import Path

from .. import assets
from ..artifact import check_file
from ..errors import LiteDetrError
from ..export.limits import check_size
from ..files import check_writable as writable_directory


def readable_file(path, what):
    """Raise LiteDetrError unless `path` is a file that can be read; `what` names it, as in 'checkpoint'."""
    check_file(path, f"the {what}")


def checkpoint(name):
    """Raise LiteDetrError unless `name` is weights that come with the package or a file that can be read."""
    if name not in assets.NAMES:
        readable_file(Path(name), "checkpoint")


def writable_model(path):
    """Raise LiteDetrError unless a model can be written to `path`."""
    if path.suffix.lower() != ".onnx":
        raise LiteDetrError(f"The output is {path}; its name must end in .onnx.")
    if path.is_dir():
        raise LiteDetrError(f"The output {path} is a directory. Give the name of a file.")
    writable_directory(path.parent)


def image_size(text):
    """Return (height, width) for 'HEIGHTxWIDTH' or one number, a square; None for 'dynamic'.

    Raises LiteDetrError for another form, and for a size that no detector takes.
    """
    if text == "dynamic":
        return None
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", str(text).strip(), re.ASCII)
    if not match:
        raise LiteDetrError(
            f"The image size is {text!r}; it must be HEIGHTxWIDTH in pixels, as in 800x1333, one number for a square, "
            "as in 640, or 'dynamic'."
        )
    size = int(match[1]), int(match[2] or match[1])
    check_size(*size)
    return size


def image_sizes(text):
    """Return a list of (height, width) for sizes separated by commas; raise LiteDetrError for 'dynamic' among them."""
    sizes = list(map(image_size, str(text).split(",")))
    if None in sizes:
        raise LiteDetrError(f"The image size is {text!r}; here it must be known: give it as 800x1333, or as 640.")
    return sizes


def batch(text):
    """Return [smallest, best, largest] for 'SMALLEST,BEST,LARGEST' or one number; None for None."""
    if text is None:
        return None
    try:
        numbers = [int(number) for number in str(text).split(",")]
    except ValueError:
        raise LiteDetrError(
            f"the batch is {text!r}; it must be the smallest, the best and the largest, as in 1,1,4, or one number."
        ) from None
    return numbers * 3 if len(numbers) == 1 else numbers


def image_files(paths):
    """Return the files that `paths` stand for, None for no paths; raise LiteDetrError unless each is an image."""
    if not paths:
        return None
    from ..runtime.images import find_images, load_image

    files = find_images(paths)
    for file in files:
        load_image(file)
    return files
