"""examples/track.py, as it is typed: the shipped detector and ByteTrack on a video."""

import runpy
import sys

import pytest

import litedetr_deploy as ld
from litedetr_deploy.assets.shapes import scene
from litedetr_deploy.runtime.video import VideoWriter, read_video

from .conftest import EXAMPLES

pytest.importorskip("av")
pytest.importorskip("supervision")

FRAMES = 8


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_objects_keep_their_numbers_while_the_camera_moves(tmp_path, monkeypatch):
    import supervision

    if not hasattr(supervision, "ByteTrack"):
        pytest.skip("supervision 0.31 has no ByteTrack")
    model = tmp_path / "shapes.onnx"
    ld.export_onnx(ld.load_model("lite-dino-shapes"), model, image_size=(256, 256), verify=False)
    wide, _, _ = scene(0, 5, (256, 320))
    writer = VideoWriter(tmp_path / "in.mp4", (256, 256), 10)
    for index in range(FRAMES):
        writer.add(wide.crop((4 * index, 0, 4 * index + 256, 256)), index / 10)
    writer.close()
    monkeypatch.setattr(sys, "argv", ["track.py", str(model), str(tmp_path / "in.mp4"), str(tmp_path / "out.mp4")])
    names = runpy.run_path(str(EXAMPLES / "track.py"))
    tracks = names["tracker"].tracked_tracks
    # The large arrow, the ring and the square are in every frame, and each was one object all the time.
    assert sum(track.start_frame == 1 and track.tracklet_len == FRAMES - 1 for track in tracks) >= 3
    assert len({track.external_track_id for track in tracks}) == len(tracks)
    assert len(list(read_video(str(tmp_path / "out.mp4"), "out.mp4"))) == FRAMES
