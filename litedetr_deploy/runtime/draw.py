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
    """Return a copy of a PIL image with `Detections` drawn on it, the best on top.

    Lines and letters grow with the image; a label keeps inside it and, where there is room, off the other labels.
    """
    image = image.convert("RGB")  # a copy, whatever the mode
    canvas = ImageDraw.Draw(image)
    line = max(1, round(min(image.size) / 240))
    names = detections.names or [f"class {label}" for label in detections.labels]
    limit = np.array(image.size * 2) - 1
    visible = []  # (box in whole pixels, colour, label text), best first
    for label, box, score, name in zip(detections.labels, detections.boxes, detections.scores, names):
        if not np.isfinite(box).all() or (box[2:] < 0).any() or (box[:2] > limit[:2]).any():
            continue
        box = np.clip(np.rint(box), 0, limit).astype(int)
        if (box[2:] >= box[:2]).all():
            visible.append((box.tolist(), class_colour(int(label)), f"{printable(name)} {score:.2f}"))

    for box, colour, _ in reversed(visible):
        canvas.rectangle(box, outline=colour, width=line)
    placed = []  # the best choose their place first
    for box, colour, text in visible:
        placed.append((colour, text, *_place(canvas, box, text, image.size, [spot for _, _, spot, _, _ in placed])))
    for colour, text, spot, origin, font in reversed(placed):
        canvas.rectangle(spot, fill=colour)
        luma = np.dot(colour, (0.299, 0.587, 0.114))  # of Rec. 601: black or white, whichever reads better
        canvas.text(origin, text, fill=(0, 0, 0) if luma > 140 else (255, 255, 255), font=font)
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


def _place(canvas, box, text, picture, taken):
    """Return the rectangle of a label, where its text begins and its font, which is smaller where it would not fit.

    It is above its box, inside at the top, below or inside at the bottom: where it hides the least of those `taken`.
    """
    for size in range(max(10, round(min(picture) / 32)), 5, -1):
        font = ImageFont.load_default(size)
        left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
        padding = max(1, (bottom - top) // 4)
        width, height = right - left + 2 * padding, bottom - top + 2 * padding
        if width <= picture[0]:
            break
    spots = []
    for x in (box[0], box[2] - width):
        for y in (box[1] - height, box[1], box[3], box[3] - height):
            x_inside, y_inside = max(0, min(x, picture[0] - 1 - width)), max(0, min(y, picture[1] - 1 - height))
            spots.append((x_inside, y_inside, x_inside + width, y_inside + height))
    spot = min(spots, key=lambda spot: sum(_overlap(spot, other) for other in taken))
    return spot, (spot[0] + padding - left, spot[1] + padding - top), font


def _overlap(one, other):
    """Return the area that two rectangles share."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    return max(0, width) * max(0, height)
