"""Images in: files and arrays to RGB images, and those to what a detector takes."""

import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ..artifact import check_file
from ..errors import LiteDetrError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
RESIZE_MODES = ("shortest_edge", "stretch", "letterbox")
SHORTEST_EDGE, LONGEST_EDGE = 800, 1333  # pixels, of the official evaluation
# The detectors subtract this mean, so that padding filled with it is 0 after normalisation, as it is in training.
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)


def find_images(paths) -> list[Path]:
    """Return a list of the files that `paths` (one path, or several) stand for; a directory gives the images in it.

    Raises LiteDetrError for a path that does not exist and for a directory without an image.
    """
    found = []
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                fix = "Give one that does, or name the files."
                raise LiteDetrError(f"The directory {path} holds no image ({', '.join(sorted(SUFFIXES))}). {fix}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise LiteDetrError(f"The image {path} does not exist. Check the path.")
    return found


def load_image(source: str | os.PathLike | bytes | Image.Image | np.ndarray) -> Image.Image:
    """Return `source` as an RGB PIL image, turned upright as its EXIF orientation says.

    source: a path; the bytes of a file; a PIL image of any integer mode (transparency is dropped, 16 bits become 8, of
    an animation the first frame counts); or an array, [H, W] grey, [H, W, 3] RGB or [H, W, 4] RGBA, uint8 or uint16.

    Raises LiteDetrError, which names the file, or the array's shape and type.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the PIL image")
    if isinstance(source, bytes):
        name = f"a file of {len(source)} bytes"
    else:
        name = str(source)
        check_file(source, "an image")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return _to_rgb(image, name)
    except (LiteDetrError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        fix = "Give a JPEG, PNG, WebP, BMP or TIFF file."
        raise LiteDetrError(f"{name} is not an image that can be read. {fix}") from error
    except Exception as error:  # decoders raise whatever a damaged file makes them trip over
        fix = "It may be damaged or incomplete: save it again, or leave it out."
        raise LiteDetrError(f"{name} cannot be read: {error}. {fix}") from error


def _to_rgb(image, name):
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; "I" is how older Pillow opens it.  convert() would clip at 255.
        grey = np.clip(np.asarray(image), 0, 65535) / 257
        image = Image.fromarray(np.rint(grey).astype(np.uint8))
    elif image.mode == "F":
        raise LiteDetrError(f"{name} has floating-point pixels, whose range is not known. Convert it to 8 bits.")
    elif image.mode == "P":  # straight to RGB, Pillow warns about palettes with transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


def _from_array(array):
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))) or array.size == 0:
        raise LiteDetrError(
            f"An image array has the shape {list(array.shape)}; it must be [height, width], [height, width, 3] (RGB) "
            "or [height, width, 4] (RGBA) and not be empty. Move the channels to the end, and give the images of a "
            "batch one by one."
        )
    if array.dtype == np.uint16:
        array = np.rint(array / 257).astype(np.uint8)
    elif array.dtype != np.uint8:
        wanted = "uint8 (0..255) or uint16 (0..65535)"
        fix = "For floats in 0..1, give `(array * 255).round().astype('uint8')`."
        raise LiteDetrError(f"An image array has the type {array.dtype}; it must be {wanted}. {fix}")
    grey = array.ndim == 3 and array.shape[2] == 1
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if grey else array)).convert("RGB")


def shortest_edge_size(width: int, height: int, shortest: int = SHORTEST_EDGE, longest: int = LONGEST_EDGE):
    """Return the (width, height) to which the official DETR evaluation resizes an image.

    The shorter side becomes `shortest`, or less where the longer one would pass `longest`.  DETR rounds the shorter
    side of such an image and truncates the longer side of any, so that it can pass `longest` by a pixel or two.
    """
    short, long = sorted((width, height))
    if long / short * shortest > longest:
        shortest = max(1, round(longest * short / long))
    long = int(shortest * long / short)
    return (shortest, long) if width < height else (long, shortest)


def letterbox_size(width: int, height: int, target_width: int, target_height: int):
    """Return a (width, height) of the same aspect ratio that fills the target as far as it can.

    Where the official evaluation's size for the target's sides fits, it is that one to the pixel.
    """
    official = shortest_edge_size(width, height, *sorted((target_width, target_height)))
    if official[0] <= target_width and official[1] <= target_height:
        return official
    scale = min(target_width / width, target_height / height)
    return (min(target_width, max(1, round(width * scale))), min(target_height, max(1, round(height * scale))))


class Prepared(NamedTuple):
    """One image as a detector takes it."""

    pixels: np.ndarray  # [3, H, W] float32, RGB, 0..1
    mask: np.ndarray  # [H, W] bool, True where there is padding
    original_size: tuple  # (width, height) of the image before the resize, in pixels


def prepare(image: Image.Image, mode: str, size: tuple | None = None) -> Prepared:
    """Return an RGB PIL image as a model takes it.

    The resize is bilinear with antialiasing, torchvision's for PIL images, hence the official evaluation's.

    mode: 'shortest_edge', as the official evaluation resizes; 'stretch', to `size` whatever the aspect ratio;
        'letterbox', to fit `size` at the same aspect ratio, at the top left, the rest filled with ImageNet's mean.
    size: (height, width) of the model's input, for 'stretch' and 'letterbox'.
    """
    if mode == "shortest_edge":
        width, height = shortest_edge_size(*image.size)
        size = height, width
    elif mode == "stretch":
        height, width = size
    else:
        width, height = letterbox_size(*image.size, size[1], size[0])
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
    pixels = np.full((3, *size), IMAGENET_MEAN[:, None, None], np.float32)
    pixels[:, :height, :width] = resized.transpose(2, 0, 1)
    mask = np.ones(size, bool)
    mask[:height, :width] = False
    return Prepared(pixels, mask, image.size)
