"""Images out: boxes with their labels and scores, drawn on the image."""

import colorsys
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import LiteDetrError, printable
from ..files import replaced_when_done

GOLDEN_RATIO = 0.618034  # steps of it around the colour circle keep neighbouring classes apart


def draw(image: Image.Image, detections) -> Image.Image:
    """Return a copy of the RGB PIL `image` with `Detections` drawn on it, the best on top.

    Lines and letters grow with the image; a label keeps inside it and, where there is room, off the other labels.
    """
    image = image.convert("RGB")  # a copy, whatever the mode
    canvas = ImageDraw.Draw(image)
    width, height = image.size
    line = max(1, round(min(width, height) / 240))
    names = detections.names or [f"class {label}" for label in detections.labels]
    limit = np.array([width - 1, height - 1] * 2)
    visible = []  # (box in whole pixels, colour, label text), best first
    for label, box, score, name in zip(detections.labels, detections.boxes, detections.scores, names):
        if not np.isfinite(box).all() or (box[2:] < 0).any() or (box[:2] > limit[:2]).any():
            continue
        box = np.clip(np.rint(box), 0, limit).astype(int)
        if (box[2:] >= box[:2]).all():
            visible.append((box.tolist(), class_colour(int(label)), f"{printable(name)} {score:.2f}"))

    for box, colour, _ in reversed(visible):
        canvas.rectangle(box, outline=colour, width=line)
    taken = []  # rectangles of the labels placed so far; the best choose first
    placed = []
    for box, colour, text in visible:
        font, text_box = _fit_font(canvas, text, width, height)
        spot = _place(box, text_box, (width, height), taken)
        taken.append(spot)
        placed.append((spot, colour, text, font, text_box))
    for spot, colour, text, font, text_box in reversed(placed):
        canvas.rectangle(spot, fill=colour)
        padding = _padding(text_box)
        origin = (spot[0] + padding - text_box[0], spot[1] + padding - text_box[1])
        canvas.text(origin, text, fill=_contrast(colour), font=font)
    return image


def save(image: Image.Image, path: str | os.PathLike):
    """Write a PIL image to `path`, in the format of its suffix; the file appears complete or not at all.

    Raises LiteDetrError when the suffix names no format that Pillow writes and when the directory cannot be written.
    """
    path = Path(path)
    Image.init()
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format not in Image.SAVE:
        raise LiteDetrError(f"{path} has the suffix {path.suffix!r}, which is no image format. Use .jpg or .png.")
    with replaced_when_done(path) as temporary:
        image.save(temporary, format=image_format, **({"quality": 92} if image_format == "JPEG" else {}))


def class_colour(label: int) -> tuple[int, int, int]:
    """Return the (red, green, blue) of a class, 0..255: always the same, and unlike that of its neighbours."""
    # The value alternates as well, so that classes a full circle apart differ.
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN_RATIO % 1, 0.85, 1.0 if label % 2 else 0.8)
    return round(red * 255), round(green * 255), round(blue * 255)


def _contrast(colour):
    """Black or white, whichever reads better on `colour`; weights of the luma of Rec. 601."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def _fit_font(canvas, text, width, height):
    """Return the font for an image of this size and the text's box in it, smaller where the text would not fit."""
    size = max(10, round(min(width, height) / 32))
    while True:
        font = ImageFont.load_default(size)
        text_box = canvas.textbbox((0, 0), text, font=font)
        if size <= 6 or text_box[2] - text_box[0] + 2 * _padding(text_box) <= width:
            return font, text_box
        size -= 1


def _padding(text_box):
    return max(1, (text_box[3] - text_box[1]) // 4)


def _place(box, text_box, picture, taken):
    """Return the rectangle of a label: above its box, inside at the top, below or inside at the bottom."""
    padding = _padding(text_box)
    width = text_box[2] - text_box[0] + 2 * padding
    height = text_box[3] - text_box[1] + 2 * padding
    spots = []
    for left in (box[0], box[2] - width):
        for top in (box[1] - height, box[1], box[3], box[3] - height):
            left_inside = max(0, min(left, picture[0] - 1 - width))
            top_inside = max(0, min(top, picture[1] - 1 - height))
            spots.append((left_inside, top_inside, left_inside + width, top_inside + height))
    return min(spots, key=lambda spot: sum(_overlap(spot, other) for other in taken))


def _overlap(one, other):
    """Return the area that two rectangles share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height)
