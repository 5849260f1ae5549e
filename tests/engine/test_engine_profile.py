import pytest

import litedetr_deploy as ld
from litedetr_deploy.engine import profile

FIXED = {"images": (-1, 3, 800, 1333), "orig_target_sizes": (-1, 2)}
DYNAMIC = {"images": (-1, 3, -1, -1), "orig_target_sizes": (-1, 2), "pixel_mask": (-1, -1, -1)}
SIZES = [(480, 480), (800, 1333), (1333, 1333)]


def test_batch_alone():
    assert profile.shapes(FIXED) == {
        "images": [(n, 3, 800, 1333) for n in (1, 1, 4)],
        "orig_target_sizes": [(1, 2), (1, 2), (4, 2)],
    }
    assert profile.shapes(FIXED, (2, 3, 5))["images"] == [(n, 3, 800, 1333) for n in (2, 3, 5)]


def test_sizes():
    shapes = profile.shapes(DYNAMIC, (1, 1, 2), SIZES)
    assert shapes["images"] == [(1, 3, 480, 480), (1, 3, 800, 1333), (2, 3, 1333, 1333)]
    assert shapes["pixel_mask"] == [(1, 480, 480), (1, 800, 1333), (2, 1333, 1333)]
    assert shapes["orig_target_sizes"] == [(1, 2), (1, 2), (2, 2)]
    assert profile.shapes(DYNAMIC, (1, 1, 1), [(640, 512)])["images"] == [(1, 3, 640, 512)] * 3


def test_what_is_asked_for_may_be_what_is_fixed():
    assert profile.shapes(FIXED, image_size=[(800, 1333)]) == profile.shapes(FIXED)
    fixed_batch = {"images": (2, 3, 64, 64)}
    assert profile.shapes(fixed_batch) == profile.shapes(fixed_batch, (2, 2, 2)) == {"images": [(2, 3, 64, 64)] * 3}


@pytest.mark.parametrize(
    "inputs, options, message",
    [
        (
            FIXED,
            {"image_size": [(640, 640)]},
            "640x640, and the graph's is fixed at 800x1333.*--image-size HEIGHTxWIDTH",
        ),
        (FIXED, {"image_size": SIZES}, "fixed at 800x1333"),
        (DYNAMIC, {}, "images of any size.*--image-size 480x480,800x1333,1333x1333"),
        ({"images": (2, 3, 64, 64)}, {"batch": (1, 1, 4)}, "the batch is 1,1,4, and the graph's is fixed at 2"),
    ],
)
def test_what_the_graph_cannot_take(inputs, options, message):
    with pytest.raises(ld.LiteDetrError, match=message):
        profile.shapes(inputs, **options)


@pytest.mark.parametrize(
    "batch, image_size, message",
    [
        ((1, 4), None, "the batch is 1,4; it must be the smallest"),
        ((0, 1, 1), None, "the batch is 0,1,1"),
        ((1, 4, 2), None, "the batch is 1,4,2"),
        (None, [(800, 1333), (480, 480), (1333, 1333)], "the image size is 800x1333,480x480,1333x1333"),
        (None, SIZES[:2], "it must be one HEIGHTxWIDTH, or the smallest"),
        (None, [(640, 63)], "no side may be smaller than 64 pixels"),
    ],
)
def test_wrong_order(batch, image_size, message):
    with pytest.raises(ld.LiteDetrError, match=message):
        profile.check(batch, image_size)


def test_images_by_another_name():
    inputs = {"pixel_mask": (-1, 64, 96), "pixel_values": (-1, 3, 64, 96)}
    found = profile.shapes(inputs, (1, 2, 4))
    assert found["pixel_values"] == [(n, 3, 64, 96) for n in (1, 2, 4)] and found["pixel_mask"][2] == (4, 64, 96)
    with pytest.raises(ld.LiteDetrError, match="no input of images"):
        profile.shapes({"tokens": (-1, 64)})
