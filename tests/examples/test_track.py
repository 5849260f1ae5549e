"""examples/track.py, as it is typed: a detector and ByteTrack on a video."""

import runpy
import sys

import pytest

import litedetr_deploy as ld
from litedetr_deploy.assets.shapes import scene
from litedetr_deploy.runtime.sources import find_sources
from litedetr_deploy.runtime.video import VideoWriter

from ..runtime.clips import save_clip
from ..runtime.tiny_artifact import save_detector
from .conftest import EXAMPLES

pytest.importorskip("av")
supervision = pytest.importorskip("supervision", exc_type=ImportError)
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.skipif(not hasattr(supervision, "ByteTrack"), reason="supervision 0.31 has no ByteTrack"),
]


def track(model, video, output, monkeypatch):
    """Run the example; return how many objects kept one number through the whole video."""
    monkeypatch.setattr(sys, "argv", ["track.py", str(model), str(video), str(output)])
    tracks = runpy.run_path(str(EXAMPLES / "track.py"))["tracker"].tracked_tracks
    [source] = find_sources(output)
    count = len(list(source.read()))
    return count, sum(one.start_frame == 1 and one.tracklet_len == count for one in tracks)


def test_objects_that_stay_keep_their_numbers(tmp_path, monkeypatch):
    clip = save_clip(tmp_path / "in.mp4", size=(320, 240))
    model = save_detector(tmp_path / "model.onnx")
    assert track(model, clip, tmp_path / "out.mp4", monkeypatch) == (10, 1)  # the other one is not there from the start


@pytest.mark.slow
def test_objects_keep_their_numbers_while_the_camera_moves(tmp_path, monkeypatch):
    model = tmp_path / "shapes.onnx"
    ld.export_onnx(ld.load_model("lite-dino-shapes"), model, image_size=(256, 256), verify=False)
    wide, _, _ = scene(0, 5, (256, 320))
    writer = VideoWriter(tmp_path / "in.mp4", (256, 256), 10)
    for index in range(8):
        writer.add(wide.crop((4 * index, 0, 4 * index + 256, 256)), index / 10)
    writer.close()
    count, kept = track(model, tmp_path / "in.mp4", tmp_path / "out.mp4", monkeypatch)
    assert count == 8 and kept >= 3  # the large arrow, the ring and the square are in every frame
