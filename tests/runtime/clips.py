"""Videos for tests: grey frames, each lighter than the one before, so that a frame tells its number."""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from litedetr_deploy.runtime.video import VideoWriter

RATE = 10  # frames per second
STEP = 20  # grey levels between frames


def grey(index, size=(64, 48)):
    return Image.new("RGB", size, (10 + STEP * index,) * 3)


def index_of(image):
    """The number of a frame, from its pixels."""
    return round((np.asarray(image).mean() - 10) / STEP)


def save_clip(path, count=10, size=(64, 48)):
    writer = VideoWriter(path, size, RATE)
    for index in range(count):
        writer.add(grey(index, size), index / RATE)
    writer.close()
    return path


def save_gif(path, count=3, size=(64, 48)):
    first, *others = (grey(index, size) for index in range(count))
    first.save(path, save_all=True, append_images=others, duration=200)
    return path


def encode(container_format, codec, count=10, size=(320, 240)):
    """The bytes of a clip that can be read in order, each frame decodable alone, with some noise."""
    import av

    noise = np.random.default_rng(0).integers(-10, 10, (*size[::-1], 3))  # or the frames would be a few bytes
    options = {"movflags": "faststart"} if container_format == "mp4" else {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip"
        with av.open(str(file), "w", format=container_format, options=options) as container:
            stream = container.add_stream(codec, RATE)
            stream.width, stream.height = size
            stream.pix_fmt, stream.gop_size = "yuv420p", 1
            for index in range(count):
                pixels = (np.asarray(grey(index, size)) + noise).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
            container.mux(stream.encode(None))
        return file.read_bytes()
