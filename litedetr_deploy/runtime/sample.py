"""Sample pictures that the package draws itself, for verification and the demo when the user gives none."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZES = ((640, 480), (640, 427), (480, 640), (612, 612))  # (width, height), the shapes usual in COCO
SCALE = 2  # drawn this much larger and reduced, for smooth edges


def sample_images(count: int, seed: int = 0) -> list[Image.Image]:
    """Return `count` RGB PIL images of street scenes, the same ones for the same seed.

    They have what tells a detector's arithmetic apart: gradients, edges at all angles, objects from a few pixels to
    half the picture, texture and noise.
    """
    return [_street(np.random.default_rng([seed, index]), *SIZES[index % len(SIZES)]) for index in range(count)]


def _street(rng, width, height):
    size = (width * SCALE, height * SCALE)
    horizon = round(size[1] * rng.uniform(0.46, 0.54))
    image = _sky(rng, size, horizon)
    _houses(rng, image, horizon)
    vanishing = round(size[0] * rng.uniform(0.4, 0.6))
    _ground(rng, image, horizon, vanishing)

    # Far to near, so that near things cover far ones.  Depth 1 is the lower edge of the picture, 0 the horizon.
    things = [(depth, _tree, side) for depth in (0.06, 0.14, 0.32) for side in (-1, 1)]
    things += [(depth, _car, side) for depth, side in zip(rng.uniform(0.12, 0.62, 4), (-1, 1, -1, 1))]
    things += [(depth, _person, rng.choice([-1, 1])) for depth in rng.uniform(0.1, 0.75, 5)]
    things += [(rng.uniform(0.2, 0.5), _traffic_light, rng.choice([-1, 1]))]
    offsets = {_tree: (1.42, 1.6), _car: (0.3, 0.62), _person: (1.08, 1.3), _traffic_light: (1.02, 1.06)}
    for depth, draw_thing, side in sorted(things, key=lambda thing: thing[0]):
        ground = horizon + depth * (size[1] - horizon)
        # The road's half width at this depth is where |offset| is 1; things keep to their side of it.
        x = vanishing + side * rng.uniform(*offsets[draw_thing]) * depth * size[0] * 0.62
        draw_thing(rng, image, float(x), float(ground), float(depth * size[1]))

    image = image.resize((width, height), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(0.5))
    pixels = np.asarray(image, np.float32)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    pixels = pixels * (1 - 0.14 * (x * x + y * y))[..., None]  # a lens is darker towards its corners
    pixels += rng.normal(0, 3, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _texture(rng, size, amplitude, cells=48, octaves=4):
    """Return [H, W] float32 of smooth noise around 0: random grids, each twice as fine and half as strong."""
    total = np.zeros((size[1], size[0]), np.float32)
    for octave in range(octaves):
        grid = (max(2, size[0] * 2**octave // (cells * 4)), max(2, size[1] * 2**octave // (cells * 4)))
        noise = Image.fromarray(rng.normal(0, 1, grid[::-1]).astype(np.float32))
        total += np.asarray(noise.resize(size, Image.Resampling.BICUBIC)) / 2**octave
    return total * amplitude


def _sky(rng, size, horizon):
    zenith = np.array(((64, 118, 190), (92, 120, 170), (52, 96, 170))[rng.integers(3)], np.float32)
    haze = np.array(((214, 228, 240), (246, 214, 180), (226, 226, 222))[rng.integers(3)], np.float32)
    fade = np.linspace(0, 1, horizon, dtype=np.float32)[:, None, None] ** 0.8
    pixels = np.zeros((size[1], size[0], 3), np.float32)
    pixels[:horizon] = zenith + (haze - zenith) * fade
    clouds = (_texture(rng, size, 1.0, cells=96, octaves=5) - 0.5).clip(0, 1)[..., None]
    pixels += (250 - pixels) * clouds * 0.75
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _houses(rng, image, horizon):
    """Draw two rows of houses with windows, the far one paler."""
    canvas = ImageDraw.Draw(image)
    unit = image.height / 100
    for haze, tallest in ((0.55, 38), (0.12, 30)):
        x = -rng.uniform(0, 6) * unit
        while x < image.width:
            house_width = rng.uniform(11, 24) * unit
            top = horizon - rng.uniform(0.45, 1) * tallest * unit
            wall = np.array(
                ((178, 92, 72), (202, 178, 140), (150, 152, 160), (120, 108, 104), (214, 196, 168), (136, 90, 74))[
                    rng.integers(6)
                ]
            ) * rng.uniform(0.85, 1.1)
            wall = wall + (210 - wall) * haze
            canvas.rectangle((x, top, x + house_width, horizon + unit), fill=_colour(wall))
            # One side in shade makes it a block.
            canvas.rectangle((x + house_width * 0.9, top, x + house_width, horizon + unit), fill=_colour(wall * 0.8))
            if rng.random() < 0.45:
                roof = np.array((112, 58, 48)) * (1 - haze) + 200 * haze
                canvas.polygon(
                    [(x - unit, top), (x + house_width / 2, top - 6 * unit), (x + house_width + unit, top)],
                    fill=_colour(roof),
                )
            else:
                canvas.rectangle((x - unit / 2, top - unit, x + house_width + unit / 2, top), fill=_colour(wall * 0.65))
            columns = max(2, int(house_width / (4.2 * unit)))
            step = house_width * 0.88 / columns
            for row in range(int((horizon - top) / (5.5 * unit))):
                for column in range(columns):
                    left, upper = x + (column + 0.22) * step, top + (row * 5.5 + 1.5) * unit
                    lit = rng.random() < 0.14
                    glass = np.array((248, 216, 140) if lit else (64, 82, 104)) * rng.uniform(0.8, 1.1)
                    frame = (
                        left - unit * 0.25,
                        upper - unit * 0.25,
                        left + step * 0.56 + unit * 0.25,
                        upper + 3.4 * unit,
                    )
                    canvas.rectangle(frame, fill=_colour(wall * 1.18))
                    canvas.rectangle(
                        (left, upper, left + step * 0.56, upper + 3 * unit), fill=_colour(glass + (200 - glass) * haze)
                    )
            x += house_width + (rng.uniform(1, 5) * unit if rng.random() < 0.3 else 0)


def _ground(rng, image, horizon, vanishing):
    """Draw the pavement and, on it, a road to the vanishing point with kerbs and a dashed line."""
    width, height = image.size
    depth = np.linspace(0, 1, height - horizon, dtype=np.float32)[:, None]
    # Texture is finer further away: squeeze it towards the horizon.
    grain = _texture(rng, (width, height - horizon), 7, cells=10, octaves=5) * (0.3 + 0.7 * depth)
    across = np.abs(np.arange(width, dtype=np.float32)[None] - vanishing) / (width * 0.62)
    road = across < depth
    kerb = (across >= depth) & (across < depth * 1.045)
    colour = np.where(road[..., None], (92, 92, 98), (172, 164, 152)).astype(np.float32)
    colour[kerb] = (206, 202, 194)
    colour *= (1.1 - 0.22 * depth)[..., None]
    # Slabs: joints at equal distances on the ground, hence at equal steps of 1 / depth.
    joint = ((1 / (depth + 0.02)) % 0.9 < 0.05 / (depth + 0.1)) & ~road & ~kerb & (depth > 0.08)
    colour[joint] *= 0.86
    dash = (across < depth * 0.016) & ((1.6 / (depth + 0.05)) % 1.0 < 0.5)
    colour[dash] = (228, 226, 214)
    colour += grain[..., None]
    pixels = np.array(image)
    pixels[horizon:] = colour.clip(0, 255)
    image.paste(Image.fromarray(pixels))


def _shadow(image, box, strength=110, blur=0.08):
    """Darken the ground under a thing: a blurred ellipse in `box`."""
    width, height = round(box[2] - box[0]), round(box[3] - box[1])
    radius = max(1, round(width * blur))
    mask = Image.new("L", (width + 2 * radius, height + 2 * radius))
    ImageDraw.Draw(mask).ellipse((radius, radius, radius + width, radius + height), fill=strength)
    mask = mask.filter(ImageFilter.BoxBlur(radius))
    image.paste((20, 20, 28), (round(box[0]) - radius, round(box[1]) - radius), mask)


def _car(rng, image, x, ground, scale):
    """Draw a car seen from behind or in front, `ground` being where its wheels stand."""
    w, h = scale * 0.62, scale * 0.46
    paint = np.array(
        ((188, 36, 40), (30, 76, 158), (226, 228, 230), (44, 48, 54), (236, 178, 44), (66, 128, 96))[rng.integers(6)]
    ) * rng.uniform(0.9, 1.05)
    facing = rng.random() < 0.5

    def rectangle(left, top, right, bottom, colour, radius=0.0):
        """In units of the car: -0.5..0.5 across, 0..1 from the ground up."""
        canvas.rounded_rectangle(
            (x + left * w, ground - top * h, x + right * w, ground - bottom * h), radius * h, fill=_colour(colour)
        )

    _shadow(image, (x - 0.6 * w, ground - 0.12 * h, x + 0.6 * w, ground + 0.1 * h), 190)
    canvas = ImageDraw.Draw(image)
    for side in (-1, 1):
        left, right = sorted((side * 0.47, side * 0.29))
        rectangle(left, 0.3, right, 0.0, (24, 24, 26), 0.06)
    cabin = [(-0.36, 0.55), (-0.27, 0.96), (0.27, 0.96), (0.36, 0.55)]
    canvas.polygon([(x + a * w, ground - b * h) for a, b in cabin], fill=_colour(paint * 0.92))
    rectangle(-0.29, 1.0, 0.29, 0.92, paint * 1.1, 0.04)
    glass = [(-0.31, 0.58), (-0.24, 0.91), (0.24, 0.91), (0.31, 0.58)]
    canvas.polygon([(x + a * w, ground - b * h) for a, b in glass], fill=(52, 66, 80))
    shine = [(-0.2, 0.6), (-0.12, 0.9), (-0.02, 0.9), (-0.1, 0.6)]
    canvas.polygon([(x + a * w, ground - b * h) for a, b in shine], fill=(112, 132, 150))
    rectangle(-0.5, 0.6, 0.5, 0.16, paint, 0.12)
    rectangle(-0.47, 0.6, 0.47, 0.52, paint * 1.14, 0.04)
    rectangle(-0.49, 0.26, 0.49, 0.14, paint * 0.55, 0.05)
    lamp = (250, 246, 220) if facing else (214, 40, 34)
    for side in (-1, 1):
        left, right = sorted((side * 0.46, side * 0.3))
        rectangle(left, 0.5, right, 0.37, lamp, 0.05)
    rectangle(-0.24, 0.46, 0.24, 0.34, (38, 40, 44) if facing else paint * 0.8, 0.02)
    rectangle(-0.11, 0.27, 0.11, 0.18, (236, 236, 228), 0.01)


def _person(rng, image, x, ground, scale):
    """Draw a walking person."""
    h = scale * 0.62
    skin = np.array(((232, 190, 160), (198, 146, 110), (122, 82, 60), (90, 60, 46))[rng.integers(4)])
    coat = rng.uniform(30, 220, 3)
    trousers = np.array(((40, 48, 72), (60, 58, 56), (96, 84, 66))[rng.integers(3)])
    stride = rng.uniform(0.03, 0.1)
    _shadow(image, (x - 0.2 * h, ground - 0.035 * h, x + 0.2 * h, ground + 0.035 * h), 150)
    canvas = ImageDraw.Draw(image)

    def limb(start, end, thickness, colour):
        points = [(x + start[0] * h, ground - start[1] * h), (x + end[0] * h, ground - end[1] * h)]
        canvas.line(points, fill=_colour(colour), width=max(1, round(thickness * h)))
        for px, py in points:
            radius = thickness * h / 2
            canvas.ellipse((px - radius, py - radius, px + radius, py + radius), fill=_colour(colour))

    limb((-0.02, 0.48), (-stride, 0.03), 0.075, trousers * 0.8)
    limb((0.02, 0.48), (stride, 0.03), 0.075, trousers)
    limb((-stride, 0.02), (-stride + 0.04, 0.02), 0.045, (30, 26, 24))
    limb((stride, 0.02), (stride + 0.04, 0.02), 0.045, (30, 26, 24))
    limb((-0.08, 0.76), (-0.1 - stride * 0.6, 0.47), 0.055, coat * 0.8)
    limb((0, 0.77), (0, 0.5), 0.17, coat)
    limb((0.08, 0.76), (0.1 + stride * 0.6, 0.47), 0.055, coat * 0.92)
    limb((0.1 + stride * 0.6, 0.45), (0.1 + stride * 0.6, 0.44), 0.045, skin)
    limb((0, 0.88), (0, 0.84), 0.05, skin * 0.85)
    canvas.ellipse((x - 0.06 * h, ground - 1.0 * h, x + 0.06 * h, ground - 0.86 * h), fill=_colour(skin))
    hair = np.array(((40, 30, 24), (96, 66, 40), (170, 140, 90), (24, 22, 22))[rng.integers(4)])
    canvas.pieslice((x - 0.065 * h, ground - 1.01 * h, x + 0.065 * h, ground - 0.87 * h), 170, 370, fill=_colour(hair))
    if rng.random() < 0.5:
        bag = rng.uniform(40, 200, 3)
        canvas.rounded_rectangle(
            (x - 0.14 * h, ground - 0.76 * h, x - 0.06 * h, ground - 0.56 * h), 0.03 * h, fill=_colour(bag)
        )


def _tree(rng, image, x, ground, scale):
    """Draw a tree whose crown is many leaves, lit from the upper left."""
    trunk, crown = scale * 0.85, scale * 0.5
    _shadow(image, (x - 0.7 * crown, ground - 0.1 * crown, x + 0.7 * crown, ground + 0.1 * crown), 120, 0.15)
    canvas = ImageDraw.Draw(image)
    thin = trunk * 0.045
    canvas.polygon(
        [(x - thin * 1.5, ground), (x - thin, ground - trunk), (x + thin, ground - trunk), (x + thin * 1.5, ground)],
        fill=(84, 62, 46),
    )
    canvas.polygon(
        [
            (x + thin * 0.4, ground),
            (x + thin * 0.3, ground - trunk),
            (x + thin, ground - trunk),
            (x + thin * 1.5, ground),
        ],
        fill=(60, 44, 34),
    )
    green = np.array(((66, 112, 52), (88, 124, 48), (52, 98, 62), (150, 118, 48))[rng.integers(4)], float)
    centre = np.array((x, ground - trunk - crown * 0.35))
    for _ in range(420):
        angle, radius = rng.uniform(0, 2 * np.pi), np.sqrt(rng.random())
        offset = np.array((np.cos(angle) * 0.8, np.sin(angle))) * radius * crown
        light = 1.0 - 0.3 * (offset[0] + offset[1]) / crown + rng.normal(0, 0.12)
        leaf = crown * rng.uniform(0.05, 0.13)
        px, py = centre + offset
        canvas.ellipse((px - leaf, py - leaf * 0.8, px + leaf, py + leaf * 0.8), fill=_colour(green * light))


def _traffic_light(rng, image, x, ground, scale):
    h = scale * 1.15
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((x - 0.012 * h, ground - 0.8 * h, x + 0.012 * h, ground), fill=(70, 74, 78))
    canvas.rounded_rectangle(
        (x - 0.06 * h, ground - 1.05 * h, x + 0.06 * h, ground - 0.72 * h), 0.02 * h, fill=(34, 38, 40)
    )
    on = rng.integers(3)
    for lamp, colour in enumerate(((236, 48, 40), (250, 190, 40), (60, 214, 110))):
        y = ground - (0.99 - 0.1 * lamp) * h
        bright = 1.0 if lamp == on else 0.28
        canvas.ellipse(
            (x - 0.038 * h, y - 0.038 * h, x + 0.038 * h, y + 0.038 * h), fill=_colour(np.array(colour) * bright)
        )


def _colour(values):
    return tuple(int(value) for value in np.clip(values, 0, 255))
