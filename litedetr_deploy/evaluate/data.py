"""Annotated images to evaluate on: COCO's layout on disk, and the drawn shapes."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..assets import shapes
from ..errors import LiteDetrError
from ..runtime.images import load_image

# (annotations, images) in a data folder: COCO's own names, and the usual ones of other data.
LAYOUTS = (("annotations/instances_val2017.json", "val2017"), ("annotations/instances_val.json", "val"))
FIELDS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}
OVERHANG = 1.0  # pixels by which COCO's own boxes leave their images, from rounding


@dataclass
class Dataset:
    """Annotated images; their pixels are loaded when they are needed."""

    name: str
    categories: dict[int, str]  # id -> name
    images: list[dict]  # COCO's entries: id, file_name, width, height
    annotations: list[dict]  # of these images: id, image_id, category_id, bbox (x, y, width, height), area, iscrowd
    load: Callable[[dict], Image.Image]  # an entry of `images` -> RGB image
    fingerprint: str  # another one for other images or annotations
    image_size: tuple[int, int] | None = None  # (height, width) that models of dynamic size take the images at


def read_coco(data: str | os.PathLike, images: str | os.PathLike | None = None, count: int | None = None) -> Dataset:
    """Return the images and boxes of a COCO annotation file.

    Args:
        data: the annotation file (.json), or a folder that holds it as one of LAYOUTS does.
        images: folder of the images; needed with an annotation file.
        count: take this many images at most, the first ones.

    Raises:
        LiteDetrError: for a file that is not COCO's or contradicts itself, for boxes that are not inside their image
            (COCO's own leave it by up to OVERHANG pixels), for images that are missing or outside their folder, and
            where nothing is left to evaluate.
    """
    file, folder = _locate(Path(data), None if images is None else Path(images))
    text = _read(file)
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LiteDetrError(
            f"{file} is not JSON ({error}). Give a COCO annotation file, such as instances_val2017.json."
        ) from error
    _check_fields(contents, file)
    categories, entries, annotations = _select(contents, file, count)
    _check_names(entries, file, folder)
    files = [(entry["file_name"], *_size_and_time(folder / entry["file_name"])) for entry in entries]
    missing = [name for name, size, _ in files if size is None]
    if missing:
        raise LiteDetrError(
            f"{len(missing)} of the {len(files)} images of {file} are not in {folder}, the first of "
            f"them {missing[0]}. Give the folder of the images that the annotations are for."
        )
    fingerprint = hashlib.sha256(text + json.dumps(files).encode()).hexdigest()
    return Dataset(str(file), categories, entries, annotations, lambda entry: _load(folder, entry), fingerprint)


def _check_names(entries, file, folder):
    """Raise LiteDetrError for a file name that leads out of the folder of images; links in it may."""
    for entry in entries:
        name = entry["file_name"]
        if not isinstance(name, str) or os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise LiteDetrError(
                f"{file} has an image with the file name {name!r}, which is not inside the folder of images {folder}, "
                "and is not read. Give the names as they are in that folder."
            )


def drawn_shapes(count: int | None = None) -> Dataset:
    """Return the validation set of drawn shapes, or the first `count` scenes of its seed, which can be more."""
    numbers = range(shapes.VALIDATION_COUNT if count is None else count)
    scenes = [shapes.scene(index, shapes.VALIDATION_SEED) for index in numbers]
    contents = shapes.coco_annotations([(labels, boxes) for _, labels, boxes in scenes])
    fingerprint = hashlib.sha256(json.dumps(contents).encode())
    for image, *_ in scenes:
        fingerprint.update(image.tobytes())
    categories, entries, annotations = _select(contents, "shapes", count)
    size = (shapes.SIZE, shapes.SIZE)
    return Dataset(
        "shapes", categories, entries, annotations, lambda entry: scenes[entry["id"]][0], fingerprint.hexdigest(), size
    )


def open_data(data: Dataset | str | os.PathLike) -> Dataset:
    """Return `data` as a `Dataset`: one already, a COCO folder, or 'shapes', the drawn shapes."""
    if isinstance(data, Dataset):
        return data
    return drawn_shapes() if data == "shapes" else read_coco(data)


def _locate(data, images):
    """Return the paths of the annotation file and of the folder of images."""
    if not data.exists():
        raise LiteDetrError(f"The data {data} does not exist. Check the path.")
    if data.is_dir():
        for file, folder in LAYOUTS:
            if (data / file).is_file():
                data, images = data / file, images or data / folder
                break
        else:
            raise LiteDetrError(
                f"The data folder {data} holds no annotations: neither "
                f"{' nor '.join(file for file, _ in LAYOUTS)} is there. Give such a folder, or the "
                "annotation file itself and the folder of its images (--images)."
            )
    elif images is None:
        raise LiteDetrError(
            f"The annotation file {data} needs the folder of its images: give it with --images (images=)."
        )
    if not images.is_dir():
        state = "is not a folder" if images.exists() else "does not exist"
        raise LiteDetrError(
            f"The folder of images {images} {state}. Give the folder that the annotations' file names are in."
        )
    if not any(images.iterdir()):
        raise LiteDetrError(
            f"The folder of images {images} is empty. Give the folder that the annotations' file names are in."
        )
    return data, images


def _read(file):
    try:
        return file.read_bytes()
    except OSError as error:
        raise LiteDetrError(
            f"The annotation file {file} cannot be read: {error.strerror}. Change its permissions or copy it."
        ) from error


def _check_fields(contents, file):
    for part, fields in FIELDS.items():
        entries = contents.get(part) if isinstance(contents, dict) else None
        if not isinstance(entries, list):
            what = f"has no list {part!r}" if isinstance(contents, dict) else f"holds a {type(contents).__name__}"
            raise LiteDetrError(
                f"{file} is not a COCO annotation file: it {what}. Wanted: an object with the lists "
                f"{', '.join(FIELDS)}."
            )
        for number, entry in enumerate(entries):
            missing = [field for field in fields if not isinstance(entry, dict) or field not in entry]
            if missing:
                raise LiteDetrError(
                    f"{file} is not a COCO annotation file: entry {number} of {part!r} lacks "
                    f"{', '.join(missing)}. Every entry needs {', '.join(fields)}."
                )


def _select(contents, source, count):
    """Return categories, images and annotations of COCO's dict as `Dataset` has them, checked."""
    if count is not None and count < 1:
        raise LiteDetrError(f"count is {count}; it must be 1 or more. Leave it out to take all images.")
    images = {entry["id"]: entry for entry in contents["images"]}
    if len(images) < len(contents["images"]):
        raise LiteDetrError(
            f"{source} has {len(contents['images'])} images with only {len(images)} different ids. "
            "Give every image an id of its own."
        )
    categories = {entry["id"]: str(entry["name"]) for entry in contents["categories"]}
    for id in categories:
        if not isinstance(id, int):
            raise LiteDetrError(f"{source} has a category with the id {id!r}; a category's id must be a whole number.")
    images_taken = contents["images"][:count]
    taken = {entry["id"] for entry in images_taken}
    annotations = []
    for annotation in contents["annotations"]:
        for field, known in (("image_id", images), ("category_id", categories)):
            if annotation[field] not in known:
                raise LiteDetrError(
                    f"In {source} the annotation {annotation['id']} has the {field} "
                    f"{annotation[field]!r}, which is not in the file. Add it or remove the "
                    "annotation."
                )
        if annotation["image_id"] in taken:
            box = _checked_box(annotation, images[annotation["image_id"]], source)
            annotations.append(
                {
                    "id": annotation["id"],
                    "image_id": annotation["image_id"],
                    "category_id": annotation["category_id"],
                    "bbox": box,
                    "area": annotation.get("area", box[2] * box[3]),
                    "iscrowd": int(annotation.get("iscrowd", 0)),
                }
            )
    if not images_taken:
        raise LiteDetrError(f"{source} lists no images: there is nothing to evaluate on. Give annotated images.")
    if all(annotation["iscrowd"] for annotation in annotations):  # crowds alone give no AP either
        raise LiteDetrError(
            f"{source} has no annotated object on the {len(images_taken)} images taken: AP is not "
            "defined. Give annotated images" + (", or a larger count." if count else ".")
        )
    return categories, images_taken, annotations


def _checked_box(annotation, image, source):
    box, width, height = annotation["bbox"], image["width"], image["height"]
    try:
        x, y, w, h = map(float, box)
        inside = (
            min(x, y) >= -OVERHANG
            and min(w, h) >= 0
            and x + w <= width + OVERHANG
            and y + h <= height + OVERHANG
            and math.isfinite(x + y + w + h)
        )
    except (TypeError, ValueError):
        inside = False
    if not inside:
        raise LiteDetrError(
            f"In {source} the annotation {annotation['id']} has the box {box}, which is not inside its "
            f"image {image['file_name']} of {width}x{height} pixels. A box is [x, y, width, height] in "
            "pixels from the top left corner: correct it or remove the annotation."
        )
    return [x, y, w, h]


def _size_and_time(path):
    """Return the size in bytes and the time of change of a file; None and None where there is no file."""
    try:
        state = path.stat()
    except OSError:
        return None, None
    return state.st_size, state.st_mtime_ns


def _load(folder, entry):
    path = folder / entry["file_name"]
    image = load_image(path)
    if image.size != (entry["width"], entry["height"]):
        raise LiteDetrError(
            f"The image {path} is {image.width}x{image.height} pixels when upright, and its "
            f"annotations are for {entry['width']}x{entry['height']}. Give the images that were "
            "annotated, without an EXIF rotation."
        )
    return image
