"""Checks of arguments that cost nothing, so that they come before torch is imported and before minutes of work."""

import re
from pathlib import Path

from .. import assets, files
from ..artifact import check_file
from ..errors import LiteDetrError
from ..export.limits import check_size

writable_directory = files.check_writable


def checkpoint(name):
    """Raise LiteDetrError for a name that is neither that of weights that come with the package, nor a file that can be
    read, nor a folder of transformers, nor one that a hub has."""
    path = Path(name)
    of_a_hub = not path.exists() and str(name).count("/") == 1
    if name not in assets.NAMES and not (path / "config.json").is_file() and not of_a_hub:
        check_file(name, "the checkpoint")


def image_size(text):
    """Return (height, width) for 'HEIGHTxWIDTH' or one number, a square; None for 'dynamic'."""
    if text == "dynamic":
        return None
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", str(text).strip(), re.ASCII)
    if not match:
        forms = "HEIGHTxWIDTH in pixels, as in 800x1333, one number for a square, as in 640, or 'dynamic'"
        raise LiteDetrError(f"The image size is {text!r}; it must be {forms}.")
    size = int(match[1]), int(match[2] or match[1])
    check_size(*size)
    return size


def image_sizes(text):
    """Return a list of (height, width) for sizes separated by commas; refuse 'dynamic' among them."""
    sizes = list(map(image_size, str(text).split(",")))
    if None in sizes:
        raise LiteDetrError(f"The image size is {text!r}; here it must be known: give it as 800x1333, or as 640.")
    return sizes


def batch(text):
    """Return [smallest, best, largest] for 'SMALLEST,BEST,LARGEST' or one number."""
    try:
        numbers = list(map(int, text.split(",")))
    except ValueError:
        forms = "the smallest, the best and the largest, as in 1,1,4, or one number"
        raise LiteDetrError(f"the batch is {text!r}; it must be {forms}.") from None
    return numbers * 3 if len(numbers) == 1 else numbers


def image_files(paths):
    """Return the files that `paths` stand for, None for no paths; each is opened."""
    if not paths:
        return None
    from ..runtime.images import find_images, load_image

    images = find_images(paths)
    for image in images:
        load_image(image)
    return images
