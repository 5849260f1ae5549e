import numpy as np
import pytest
from PIL import Image

from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.runtime.images import (
    IMAGENET_MEAN,
    find_images,
    letterbox_size,
    load_image,
    prepare,
    shortest_edge_size,
)


# Worked out by hand with DETR's rule: shorter side 800, longer at most 1333; the shorter side rounded, the longer
# truncated.
@pytest.mark.parametrize(
    "original, expected",
    [
        ((640, 480), (1066, 800)),  # 800 * 4/3 = 1066.67, truncated
        ((480, 640), (800, 1066)),
        ((640, 427), (1199, 800)),  # 800 * 640/427 = 1199.06
        ((800, 800), (800, 800)),
        ((500, 500), (800, 800)),
        ((1920, 1080), (1333, 750)),  # 1333 * 9/16 = 749.8 -> 750; 750 * 16/9 = 1333.3
        ((1080, 1920), (750, 1333)),
        ((640, 200), (1334, 417)),  # 1333 * 200/640 = 416.6 -> 417; 417 * 3.2 = 1334.4: DETR passes 1333 here
        ((10000, 1), (10000, 1)),  # 0.13 would round to no pixel at all
    ],
)
def test_shortest_edge_size(original, expected):
    assert shortest_edge_size(*original) == expected


@pytest.mark.parametrize(
    "original, target, expected",
    [
        ((640, 480), (1333, 800), (1066, 800)),  # the official size where it fits
        ((480, 640), (1333, 800), (600, 800)),
        ((480, 640), (640, 640), (480, 640)),
        ((1000, 10), (640, 480), (600, 6)),  # DETR rounds the shorter side first
        ((10000, 1), (640, 640), (640, 1)),
    ],
)
def test_letterbox_size(original, target, expected):
    assert letterbox_size(*original, *target) == expected


def test_letterbox_fits_and_keeps_the_aspect_ratio():
    rng = np.random.default_rng(0)
    for width, height, target_width, target_height in rng.integers(1, 2000, (2000, 4)).tolist():
        size = letterbox_size(width, height, target_width, target_height)
        assert 1 <= size[0] <= target_width and 1 <= size[1] <= target_height
        # within a pixel of the shorter side
        assert abs(size[0] * height - size[1] * width) <= max(width, height)


def gradient(width, height):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8))


def test_prepare_stretch_is_a_plain_resize():
    image = gradient(31, 47)
    prepared = prepare(image, "stretch", (64, 96))
    expected = np.asarray(image.resize((96, 64), Image.Resampling.BILINEAR), np.float32) / 255
    assert prepared.pixels.dtype == np.float32
    np.testing.assert_array_equal(prepared.pixels, expected.transpose(2, 0, 1))
    assert not prepared.mask.any()
    assert prepared.original_size == (31, 47)


def test_prepare_letterbox_pads_bottom_and_right_with_the_mean():
    prepared = prepare(gradient(40, 80), "letterbox", (64, 96))
    assert prepared.pixels.shape == (3, 64, 96) and prepared.mask.shape == (64, 96)
    assert not prepared.mask[:, :32].any() and prepared.mask[:, 32:].all()
    np.testing.assert_array_equal(prepared.pixels[:, 5, 50], IMAGENET_MEAN)
    expected = prepare(gradient(40, 80), "stretch", (64, 32))
    np.testing.assert_array_equal(prepared.pixels[:, :, :32], expected.pixels)


def test_prepare_shortest_edge():
    prepared = prepare(gradient(64, 48), "shortest_edge")
    assert prepared.pixels.shape == (3, 800, 1066) and not prepared.mask.any()


def test_load_path_pil_and_array_agree(tmp_path):
    image = gradient(20, 10)
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), image, np.asarray(image)):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image))


def test_exif_orientation_is_honoured(tmp_path):
    image = gradient(20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    loaded = load_image(tmp_path / "turned.png")
    assert loaded.size == (10, 20)
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_become_rgb(mode):
    loaded = load_image(gradient(20, 10).convert(mode))
    assert loaded.mode == "RGB" and loaded.size == (20, 10)


def test_sixteen_bits_become_eight(tmp_path):
    grey = np.array([[0, 257, 65535], [32896, 1, 65534]], np.uint16)
    expected = np.array([[0, 1, 255], [128, 0, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    for source in (tmp_path / "deep.png", grey, Image.fromarray(grey.astype(np.int32))):
        np.testing.assert_array_equal(np.asarray(load_image(source))[:, :, 1], expected)


def test_palette_with_transparency_is_quiet(recwarn):
    image = gradient(20, 10).convert("P")
    image.info["transparency"] = bytes(range(256))
    assert load_image(image).mode == "RGB"
    assert not recwarn


@pytest.mark.parametrize("shape", [(10, 20), (10, 20, 1), (10, 20, 3), (10, 20, 4)])
def test_array_shapes(shape):
    assert load_image(np.full(shape, 7, np.uint8)).getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((3, 10, 20), np.uint8), r"shape \[3, 10, 20\].*channels to the end"),
        (np.zeros((0, 5, 3), np.uint8), r"shape \[0, 5, 3\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), "one by one"),
        (np.zeros((4, 4, 3), np.float32), r"type float32.*uint8"),
    ],
)
def test_array_errors(array, message):
    with pytest.raises(LiteDetrError, match=message):
        load_image(array)


def test_file_errors_name_the_file(tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture")
    gradient(200, 100).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    Image.new("F", (4, 4)).save(tmp_path / "float.tiff")
    for name, message in (
        ("text.jpg", "not an image"),
        ("half.jpg", "cannot be read"),
        ("gone.jpg", "does not exist"),
        ("float.tiff", "floating-point"),
    ):
        with pytest.raises(LiteDetrError, match=message) as caught:
            load_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(LiteDetrError, match="is a directory"):
        load_image(tmp_path)


def test_bytes_of_a_file(tmp_path):
    gradient(200, 100).save(tmp_path / "a.png")
    contents = (tmp_path / "a.png").read_bytes()
    assert load_image(contents).tobytes() == load_image(tmp_path / "a.png").tobytes()
    with pytest.raises(LiteDetrError, match="a file of 100 bytes cannot be read"):
        load_image(contents[:100])
    with pytest.raises(LiteDetrError, match="a file of 7 bytes is not an image"):
        load_image(b"nothing")


def test_find_images(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in find_images(tmp_path)] == ["a.jpg", "b.PNG"]
    assert find_images([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]  # named by the user: load_image will say
    with pytest.raises(LiteDetrError, match="holds no image"):
        find_images([tmp_path / "empty"])
    with pytest.raises(LiteDetrError, match="does not exist"):
        find_images([tmp_path / "gone"])
