"""Checks of arguments that cost nothing, so that they come before torch is imported and before minutes of work."""

import os
import re
from pathlib import Path

from .. import assets
from ..errors import LiteDetrError


def readable_file(path, what):
    """Raise LiteDetrError unless `path` is a file that can be read; `what` names it, as in 'checkpoint'."""
    if not path.exists():
        raise LiteDetrError(f"The {what} {path} does not exist. Check the path.")
    if not path.is_file():
        raise LiteDetrError(f"The {what} {path} is not a file. Give the path of the file itself.")
    if not os.access(path, os.R_OK):
        raise LiteDetrError(f"The {what} {path} cannot be read: permission denied. Change its permissions or copy it.")


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


def writable_directory(path):
    """Raise LiteDetrError unless `path` is a directory that files can be made in."""
    if not path.is_dir():
        state = "is not a directory" if path.exists() else "does not exist"
        raise LiteDetrError(f"The output directory {path} {state}. Make it first, or choose another.")
    if not os.access(path, os.W_OK | os.X_OK):
        raise LiteDetrError(f"The output directory {path} is not writable. Choose another, or change its permissions.")


def image_size(text):
    """Return (height, width) for 'HEIGHTxWIDTH' or one number, a square; None for 'dynamic'.

    Raises LiteDetrError for another form.
    """
    if text == "dynamic":
        return None
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", str(text).strip(), re.ASCII)
    if not match:
        raise LiteDetrError(
            f"The image size is {text!r}; it must be HEIGHTxWIDTH in pixels, as in 800x1333, one number for a square, "
            "as in 640, or 'dynamic'."
        )
    return int(match[1]), int(match[2] or match[1])


def image_sizes(text):
    """Return a list of (height, width) for sizes separated by commas; raise LiteDetrError for 'dynamic' among them."""
    sizes = list(map(image_size, str(text).split(",")))
    if None in sizes:
        raise LiteDetrError(f"The image size is {text!r}; here it must be known: give it as 800x1333, or as 640.")
    return sizes


def image_files(paths):
    """Return the files that `paths` stand for, None for no paths; raise LiteDetrError unless each is an image."""
    if not paths:
        return None
    from ..runtime.images import find_images, load_image

    files = find_images(paths)
    for file in files:
        load_image(file)
    return files
