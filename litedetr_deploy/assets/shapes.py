"""A detection dataset that is drawn, not downloaded: shapes of ten classes on textured grounds, with exact boxes.

A scene is a function of (seed, index) alone and has the same bytes on every machine.  That is why outlines come from
`math`, coverage is counted in whole numbers, images are resized and blurred as 8-bit ones (Pillow does those in fixed
point), and no NumPy function is used whose last bit depends on the processor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from ..errors import LiteDetrError

SIZE = 256  # pixels, height and width
TRAIN_SEED = 1
VALIDATION_SEED = 2
VALIDATION_COUNT = 400  # the validation set is scenes 0 to 399 of VALIDATION_SEED at SIZE

SMALLEST = 8  # pixels, the longer side of a box
LARGEST = 0.8  # of the image's shorter side
MOST_CUT = 0.13  # of a box's width, and of its height, beyond the image's border
MOST_COVERED = 0.5  # of a shape's area, by the shapes in front of it
LUMA = (0.3, 0.59, 0.11)


def _arc(radius, start, end, count, x=0.0):
    """Points of a circle around (x, 0), from one angle to the other in degrees, both included."""
    angles = [math.radians(start + (end - start) * i / (count - 1)) for i in range(count)]
    return [(x + radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _polar(radius, angle):
    return radius * math.cos(angle), radius * math.sin(angle)


def _heart(a):
    return -16 * math.sin(a) ** 3, 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)


# Closed contours of any size, centred near 0; outer ones turn from x towards y, holes the other way.  The classes
# differ in what survives at 8 pixels and under any rotation: corners, notches, holes, elongation.
OUTLINES = {
    "disc": [_arc(1, 0, 354.375, 64)],
    "ring": [_arc(1, 0, 354.375, 64), _arc(0.58, 354.375, 0, 64)],
    "square": [[(-1, -1), (1, -1), (1, 1), (-1, 1)]],
    "triangle": [_arc(1, 0, 240, 3)],
    "star": [[_polar((1, 0.42)[i % 2], math.pi * i / 5) for i in range(10)]],
    "cross": [[
        (-1, -0.33), (-0.33, -0.33), (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33),
        (1, 0.33), (0.33, 0.33), (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33),
    ]],
    "arrow": [[(-1, -0.24), (0.05, -0.24), (0.05, -0.78), (1, 0), (0.05, 0.78), (0.05, 0.24), (-1, 0.24)]],
    # The two circles meet at x = 0.61.
    "crescent": [_arc(1, 52.41, 307.59, 40) + _arc(0.8, 277.9, 82.1, 30, x=0.5)],
    "heart": [[_heart(math.tau * i / 48) for i in range(48)]],
    "hourglass": [[(-0.75, -1), (0.75, -1), (0.15, 0), (0.75, 1), (-0.75, 1), (-0.15, 0)]],
}  # fmt: skip
OUTLINES = {
    name: [np.array(contour) / np.abs(np.array(contours[0])).max() for contour in contours]
    for name, contours in OUTLINES.items()
}
CLASS_NAMES = tuple(OUTLINES)


@dataclass
class Shape:
    label: int
    coverage: np.ndarray  # of each pixel, [h, w] float32 from 0 to 1
    extent: np.ndarray  # [4] float64 xyxy in the coordinates of `coverage`, from the outline's points
    left: int = 0  # of `coverage`, in pixels of the image; negative where the border cuts it
    top: int = 0

    @property
    def longest(self) -> float:
        return float(max(self.extent[2] - self.extent[0], self.extent[3] - self.extent[1]))

    def box(self, size: tuple[int, int]) -> np.ndarray:
        """The tight box of the whole outline, clipped to the image: [4] float64 xyxy in pixels."""
        height, width = size
        x0, y0, x1, y1 = self.extent + (self.left, self.top, self.left, self.top)
        return np.array((max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)))


def scene(index: int, seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Draw one scene: an RGB image of `size` (height, width), boxes [K, 4] float32 xyxy in pixels and labels [K] int64,
    which index CLASS_NAMES.  A box is that of the whole outline, clipped to the image, also where another shape covers
    some of it.  Raises LiteDetrError for a size that has no room for shapes."""
    if min(size) < 32:
        raise LiteDetrError(
            f"The size of a scene is {size[0]}x{size[1]}; both sides must be at least 32 pixels. "
            f"Choose a larger one, as {SIZE}x{SIZE}."
        )
    rng = np.random.Generator(np.random.PCG64([seed, index]))
    shapes = _place(rng, size)
    canvas = _ground(rng, size)
    for shape in shapes:
        _draw(rng, canvas, shape)
    boxes = np.array([shape.box(size) for shape in shapes], np.float32)
    return _photograph(rng, canvas), boxes, np.array([shape.label for shape in shapes], np.int64)


def coco_annotations(objects: Iterable[tuple[np.ndarray, np.ndarray]], size: tuple[int, int] = (SIZE, SIZE)) -> dict:
    """Return the scenes' objects, (boxes, labels) of images 0, 1, 2, ..., in COCO's annotation format.  A category's id
    is its label; the file of image 7 is 000007.png."""
    images, annotations = [], []
    for image, (boxes, labels) in enumerate(objects):
        images.append({"id": image, "file_name": f"{image:06}.png", "height": size[0], "width": size[1]})
        for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist()):
            # Ids from 1: pycocotools takes the id 0 for "no match".
            w, h = x1 - x0, y1 - y0
            identity = {"id": len(annotations) + 1, "image_id": image, "category_id": label}
            annotations.append({**identity, "iscrowd": 0, "bbox": [x0, y0, w, h], "area": w * h})
    categories = [{"id": label, "name": name} for label, name in enumerate(CLASS_NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _place(rng, size):
    """Return 2 to 9 shapes, back to front, none of them covered by more than MOST_COVERED."""
    height, width = size
    wanted = rng.integers(2, 10)
    shapes, area, visible = [], [0], [0]
    front = np.zeros(size, np.uint8)  # the number of the shape that a pixel shows, from 1; 0 is ground
    for _ in range(60):
        longest = SMALLEST * (LARGEST * min(size) / SMALLEST) ** rng.random()
        shape = _shape(rng, int(rng.integers(len(CLASS_NAMES))), longest)
        x0, y0, x1, y1 = shape.extent
        cut_x, cut_y = MOST_CUT * (x1 - x0), MOST_CUT * (y1 - y0)
        shape.left = math.floor(rng.uniform(-cut_x, width - (x1 - x0) + cut_x) - x0 + 0.5)
        shape.top = math.floor(rng.uniform(-cut_y, height - (y1 - y0) + cut_y) - y0 + 0.5)
        there, here = _overlap(front, shape.coverage, shape.left, shape.top)
        inside = shape.coverage[here] > 0.5
        covered = np.bincount(front[there][inside], minlength=len(area))
        if any(visible[i] - covered[i] < (1 - MOST_COVERED) * area[i] for i in range(1, len(area))):
            continue
        shapes.append(shape)
        front[there][inside] = len(shapes)
        visible = [now - int(less) for now, less in zip(visible, covered)] + [int(covered.sum())]
        area.append(visible[-1])
        if len(shapes) == wanted:
            break
    return shapes


def _shape(rng, label, longest):
    """Return the class's outline turned, squeezed and seen at a slight slant, its box's longer side `longest`."""
    angle, slant = math.tau * rng.random(), math.tau * rng.random()
    squeeze, lean = rng.uniform(0.84, 1), rng.uniform(-0.12, 0.14, 2)
    contours = []
    for contour in OUTLINES[CLASS_NAMES[label]]:
        # Squeezed along the direction `slant`, then turned.
        x, y = _turn(contour[:, 0], contour[:, 1], slant)
        x, y = _turn(x * squeeze, y, angle)
        depth = 1 + lean[0] * x + lean[1] * y
        contours.append(np.stack((x / depth, y / depth), 1))
    points = np.concatenate(contours)
    low, high = points.min(0), points.max(0)
    scale = longest / (high - low).max()
    shift = 1 + rng.random(2) - low * scale  # a pixel of margin, and any position between two pixels
    contours = [contour * scale + shift for contour in contours]
    extent = np.concatenate((low * scale + shift, high * scale + shift))
    return Shape(label, _coverage(contours, math.ceil(extent[3]) + 1, math.ceil(extent[2]) + 1), extent)


def _turn(x, y, angle):
    cos, sin = math.cos(angle), math.sin(angle)
    return x * cos - y * sin, x * sin + y * cos


def _coverage(contours, height, width):
    """Return what part of each pixel lies inside the contours, [height, width] float32.  They are [n, 2] points (x, y)
    inside the pixels' area, and turn as those of OUTLINES do.  Four lines through every row of pixels are cut with the
    edges; along a line coverage is exact to 1/64 pixel, and all sums are of whole numbers."""
    x0, y0 = np.concatenate(contours).T
    x1, y1 = np.concatenate([np.roll(contour, -1, axis=0) for contour in contours]).T
    # Line i is at y = (i + 1/2) / 4; an edge cuts those from `first` on, as many as `cuts`.
    line0, line1 = np.floor(y0 * 4 + 0.5).astype(np.int64), np.floor(y1 * 4 + 0.5).astype(np.int64)
    first, cuts = np.minimum(line0, line1), np.abs(line1 - line0)
    edge = np.repeat(np.arange(len(cuts)), cuts)
    line = np.arange(len(edge)) - (np.cumsum(cuts) - cuts - first)[edge]
    slope = (x1 - x0)[edge] / (y1 - y0)[edge]
    x = ((x0[edge] + ((line + 0.5) / 4 - y0[edge]) * slope) * 64).astype(np.int64)
    direction = np.sign(line0 - line1)[edge]
    # Right of an entry everything is inside until the exit: each adds its part to its pixel and the rest to the next.
    pixel, part = line // 4 * (width + 1) + (x >> 6), x & 63
    parts = np.concatenate((direction * (64 - part), direction * part))
    steps = np.bincount(np.concatenate((pixel, pixel + 1)), parts, minlength=height * (width + 1))
    return steps.reshape(height, width + 1).cumsum(1, np.float32)[:, :width] * np.float32(1 / 256)


def _overlap(image, patch, left, top):
    """Return the slices of `image` [..., H, W], and those of `patch` [h, w], where the patch put there overlaps it."""
    (height, width), (h, w) = image.shape[-2:], patch.shape
    y0, y1, x0, x1 = max(top, 0), min(top + h, height), max(left, 0), min(left + w, width)
    return (..., slice(y0, y1), slice(x0, x1)), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))


def _noise(rng, size, cells, octaves):
    """Return [H, W] float32 from 0 to 1: random grids, each three times as fine as the one before and half as strong;
    `cells`: of the first, along the longer side."""
    # Summed at half the size, which is faster and shows no difference under the grain of the photograph.
    half = [side // 2 + 1 for side in size]
    total = np.zeros(half, np.float32)
    weight = 1 / (2 - 0.5 ** (octaves - 1)) / 255
    for octave in range(octaves):
        grid = [max(2, math.ceil(cells * 3**octave * side / max(size)) + 1) for side in size]
        image = Image.fromarray(rng.integers(0, 256, grid, np.uint8))
        total += np.asarray(image.resize(half[::-1], Image.Resampling.BICUBIC)) * np.float32(weight)
        weight /= 2
    double = np.empty((2 * half[0] - 1, 2 * half[1] - 1), np.float32)
    double[::2, ::2] = total
    double[::2, 1::2] = (total[:, :-1] + total[:, 1:]) * np.float32(0.5)
    double[1::2] = (double[:-2:2] + double[2::2]) * np.float32(0.5)
    return double[: size[0], : size[1]]


def _axes(rng, size, angle):
    """Return pixel coordinates along and across a direction, two [H, W] float32, from an origin anywhere."""
    x = np.arange(size[1], dtype=np.float32) + np.float32(1000 * rng.random())
    y = np.arange(size[0], dtype=np.float32)[:, None] + np.float32(1000 * rng.random())
    return _turn(x, y, angle)


def _blocks(rng, size):
    """Return the shades of masonry, boards or tiles, [H, W] float32 around 1, with dark or light joints."""
    block_height = rng.uniform(14, 48)
    block_width = block_height * (1, 2.2, 8)[rng.integers(3)]
    stagger = rng.random() * rng.integers(2)
    angle = rng.uniform(-0.15, 0.15) + math.pi / 2 * rng.integers(2)
    along, across = _axes(rng, size, angle)
    across = across * np.float32(1 / block_height)
    row = np.floor(across)
    along = along * np.float32(1 / block_width) + row * np.float32(stagger)
    column = np.floor(along)
    shades = rng.uniform(0.86, 1.12, 128).astype(np.float32)
    shade = shades[(row * 31 + column * 17).astype(np.int32) & 127]
    across -= row
    along -= column
    down = np.minimum(across, 1 - across) * np.float32(block_height)
    edge = np.minimum(down, np.minimum(along, 1 - along) * np.float32(block_width))
    joint = np.clip(np.float32(rng.uniform(1.2, 2.2)) - edge, 0, 1)
    return shade * (1 + joint * np.float32((-0.35, 0.25)[rng.integers(2)]))


def _stripes(rng, size, period):
    """Return soft stripes at any angle, [H, W] float32 from 0 to 1."""
    across = _axes(rng, size, math.tau * rng.random())[0] * np.float32(1 / period)
    across -= np.floor(across)
    return np.clip(np.abs(across - np.float32(0.5)) * 8 - np.float32(1.5), 0, 1)


def _ground(rng, size):
    """Return a textured background, [3, H, W] float32 from 0 to 255."""
    colour = rng.uniform(60, 195) + rng.uniform(-30, 30, 3)
    other = colour + rng.uniform(-45, 45) + rng.uniform(-15, 15, 3)
    blend = _noise(rng, size, cells=rng.integers(2, 16), octaves=int(rng.integers(1, 4)))
    light = np.linspace(-1, 1, size[1], dtype=np.float32) * np.float32(rng.uniform(-0.2, 0.2))
    light = 1 + light + (np.linspace(-1, 1, size[0], dtype=np.float32) * np.float32(rng.uniform(-0.2, 0.2)))[:, None]
    kind = rng.integers(4)
    if kind == 0:
        light *= _blocks(rng, size)
    elif kind == 1:
        light *= 1 + _stripes(rng, size, rng.uniform(12, 60)) * np.float32(rng.uniform(-0.2, 0.2))
    elif kind == 2:  # soil, gravel, grass
        light *= np.float32(0.8) + np.float32(0.4) * _noise(rng, size, cells=64, octaves=2)
    _clutter(rng, light)
    blend *= light
    canvas = np.empty((3, *size), np.float32)
    for plane, one, step in zip(canvas, colour.astype(np.float32), (other - colour).astype(np.float32)):
        np.multiply(light, one, out=plane)
        plane += blend * step
    return canvas


def _planes(colour):
    return np.asarray(colour, np.float32)[:, None, None]


def _clutter(rng, light):
    """Darken or lighten the ground, which it changes, where things of no class lie: straight lines and soft stains."""
    height, width = light.shape
    for _ in range(rng.integers(0, 4)):
        if rng.random() < 0.5:
            length, thickness = rng.uniform(0.2, 1) * max(height, width), rng.uniform(0.7, 2.5)
            corners = np.array(((0, length, length, 0), (0, 0, thickness, thickness)))
            x, y = _turn(corners[0], corners[1], math.tau * rng.random())
            x, y = x - x.min(), y - y.min()
            mask = _coverage([np.stack((x, y), 1)], math.ceil(y.max()) + 1, math.ceil(x.max()) + 1)
        else:
            side = round(rng.uniform(0.2, 0.5) * min(height, width))
            slope = np.linspace(-1, 1, side, dtype=np.float32)
            fade = 1 - slope * slope - (slope * slope)[:, None]  # towards the border
            mask = np.clip((_noise(rng, (side, side), cells=3, octaves=2) + fade - 1) * 2, 0, 1)
        left, top = (int(rng.integers(side)) - extent // 2 for side, extent in zip((width, height), mask.shape[::-1]))
        there, here = _overlap(light, mask, left, top)
        light[there] *= 1 + mask[here] * np.float32((-1, 1)[rng.integers(2)] * rng.uniform(0.15, 0.4))


def _draw(rng, canvas, shape):
    """Draw a shape on the canvas, which it changes: its shadow, its filling, its outline."""
    there, here = _overlap(canvas, shape.coverage, shape.left, shape.top)
    tiny, small = shape.longest < 16, shape.longest < 28
    if not tiny and rng.random() < 0.35:
        _cast_shadow(rng, canvas, shape)

    outlined = not small and rng.random() < 0.3  # a rim around what hardly differs from the ground would be a ring
    step = max(1, int(shape.longest) // 12)
    around = canvas[there][:, ::step, ::step].astype(np.int64)  # whole numbers have one sum, in any order
    behind = around.sum((1, 2)) / (around.shape[1] * around.shape[2])
    colour = _colour_unlike(rng, behind, 80 if tiny else rng.uniform(40, 80) + 20 * outlined)
    filling = _planes(colour)
    kind = rng.integers(2 if small else 4)
    if kind:
        size = shape.coverage.shape
        if kind == 1:
            along = _axes(rng, size, math.tau * rng.random())[0]
            blend = (along - along.min()) * np.float32(1 / shape.longest)
        elif kind == 2:
            blend = _noise(rng, size, cells=rng.integers(2, 8), octaves=2)
        else:
            blend = _stripes(rng, size, shape.longest * rng.uniform(0.12, 0.3))
        other = colour + rng.uniform(-50, 50) + rng.uniform(-30, 30, 3)
        # The second colour must not come closer to the ground than the first.
        if _difference(other, behind) < _difference(colour, behind):
            other = 2 * colour - other
        filling = filling + _planes(other - colour) * blend[here]
    if outlined:
        # At distance d inside a straight edge a box blur of radius r gives 1/2 + d / (2 r + 1).
        thickness = shape.longest * rng.uniform(0.03, 0.07)  # of the rim, about, in pixels
        inner = np.clip(_blurred(np.pad(shape.coverage, 1), thickness * 1.4)[1:-1, 1:-1] * 5 - 4, 0, 1)[here]
        line = _planes(_colour_unlike(rng, colour, 60))
        filling = line + (filling - line) * inner
    part = canvas[there]
    filling = filling - part
    filling *= shape.coverage[here]
    part += filling


def _difference(colour, other):
    return math.sqrt(sum(weight * (a - b) ** 2 for weight, a, b in zip(LUMA, colour, other)))


def _colour_unlike(rng, other, difference):
    """Return an RGB colour, [3] float64, that differs from another by so much, or by all that 20 draws gave."""
    best = max((rng.uniform(15, 240, 3) for _ in range(2)), key=lambda colour: _difference(colour, other))
    for _ in range(18):
        if _difference(best, other) >= difference:
            break
        best = max(best, rng.uniform(15, 240, 3), key=lambda colour: _difference(colour, other))
    return best


def _blurred(coverage, radius):
    """Return the coverage after a box blur, [h, w] float32 from 0 to 1."""
    image = Image.fromarray((coverage * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.BoxBlur(radius))) * np.float32(1 / 255)


def _cast_shadow(rng, canvas, shape):
    """Darken the ground beside a shape, which lies a little above it."""
    reach = shape.longest * rng.uniform(0.03, 0.1)
    dx, dy = (round(reach * part) for part in rng.uniform(-1, 1, 2))
    margin = math.ceil(reach)
    mask = _blurred(np.pad(shape.coverage, margin), reach / 2)
    there, here = _overlap(canvas, mask, shape.left - margin + dx, shape.top - margin + dy)
    canvas[there] *= 1 - mask[here] * np.float32(rng.uniform(0.25, 0.6))


def _photograph(rng, canvas):
    """Return the canvas as an RGB image, as a camera sees it: contrast, tint, blur, noise."""
    contrast, brightness = rng.uniform(0.8, 1.1), rng.uniform(-20, 20)
    tint = rng.uniform(-8, 8, 3) + brightness + 128 * (1 - contrast)
    blur, grain = np.float32(rng.uniform(0, 0.25)), np.float32(rng.uniform(1, 10) / 128)
    planes = []
    for plane, offset in zip(canvas, tint.astype(np.float32)):
        plane = plane * np.float32(contrast) + offset
        for line in (plane, plane.T):  # each pixel goes some way towards its neighbours
            step = line[1:] - line[:-1]
            step *= blur
            line[:-1] += step
            line[1:] -= step
        plane += grain * np.frombuffer(rng.bytes(plane.size), np.int8).reshape(plane.shape)
        planes.append(Image.fromarray(np.clip(plane, 0, 255, out=plane).astype(np.uint8)))
    return Image.merge("RGB", planes)
