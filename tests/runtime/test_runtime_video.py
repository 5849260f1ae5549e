"""Video in and out: frames, times, streams that break."""

import contextlib
import http.server
import os
import struct
import threading
import warnings

import numpy as np
import pytest
from PIL import Image

from litedetr_deploy.errors import LiteDetrError, Notice
from litedetr_deploy.runtime import video
from litedetr_deploy.runtime.sources import find_sources
from litedetr_deploy.runtime.video import VideoWriter, read_video

from .clips import encode, grey, index_of, save_clip, save_gif

av = pytest.importorskip("av")


class Server:
    """Serves `content`; the first `broken` answers stop after `share` of it, and those after `gone` are refused."""

    def __init__(self, content, broken=0, share=0.5, gone=None, kind="video/mp4", has_length=True):
        self.requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):
                self.requests.append(handler.headers)
                number = len(self.requests)
                if gone is not None and number > gone:
                    handler.send_error(503)
                    return
                handler.send_response(200)
                handler.send_header("Content-Type", kind)
                if has_length:
                    handler.send_header("Content-Length", str(len(content)))
                handler.end_headers()
                with contextlib.suppress(OSError):  # the reader has gone
                    handler.wfile.write(content[: int(len(content) * share)] if number <= broken else content)

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(video, "PAUSE", 0.0)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    servers = []

    def start(*arguments, **settings):
        servers.append(Server(*arguments, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def read(source):
    return [frame for one in find_sources(source) for frame in one.read()]


@pytest.mark.parametrize("suffix", sorted(video.WRITTEN))
def test_what_is_written_is_read(tmp_path, suffix):
    path = save_clip(tmp_path / f"a{suffix}")
    frames = read(path)
    assert [index_of(frame.image) for frame in frames] == [frame.index for frame in frames] == list(range(10))
    assert [frame.time for frame in frames] == pytest.approx([0.1 * index for index in range(10)], abs=1e-3)
    assert {frame.path for frame in frames} == {str(path)} and frames[0].rate == pytest.approx(10)
    assert frames[0].count == 10 and frames[0].image.size == (64, 48)
    assert os.listdir(tmp_path) == [path.name]


def test_uneven_times_are_kept(tmp_path):
    times = [0, 0.05, 0.5, 0.6]
    writer = VideoWriter(tmp_path / "a.mp4", (64, 48), 25)
    for index, seconds in enumerate(times):
        writer.add(grey(index), seconds)
    writer.close()
    assert [frame.time for frame in read(tmp_path / "a.mp4")] == pytest.approx(times, abs=1e-3)


@pytest.mark.parametrize("suffix, size", [(".mp4", (34, 22)), (".gif", (33, 21))])
def test_odd_sizes_and_one_frame(tmp_path, suffix, size):
    [frame] = read(save_clip(tmp_path / f"a{suffix}", 1, (33, 21)))
    assert frame.image.size == size and index_of(frame.image) == 0


def test_a_writer_that_is_dropped_leaves_nothing(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", (64, 48), 10)
    writer.add(grey(0), 0)
    writer.drop()
    assert os.listdir(tmp_path) == []


def test_without_an_encoder_for_h264(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "_h264", lambda av: "mpeg4")
    assert [index_of(frame.image) for frame in read(save_clip(tmp_path / "a.mp4"))] == list(range(10))


def test_animated_gifs_are_videos_and_still_ones_images(tmp_path):
    frames = read(save_gif(tmp_path / "a.gif"))
    assert [index_of(frame.image) for frame in frames] == [0, 1, 2] and [frame.time for frame in frames] == [
        0,
        0.2,
        0.4,
    ]
    assert frames[0].rate == pytest.approx(5) and frames[0].count == 3
    grey(0).save(tmp_path / "b.gif")
    [frame] = read(tmp_path / "b.gif")
    assert frame.index is None
    assert [one.kind for one in find_sources([tmp_path / "a.gif", tmp_path / "b.gif"])] == ["video", "image"]


def test_videos_of_phones_are_turned_upright(tmp_path):
    halves = Image.new("RGB", (64, 48))
    halves.paste((255, 255, 255), (0, 0, 32, 48))  # its left is white
    writer = VideoWriter(tmp_path / "a.mp4", (64, 48), 10)
    writer.add(halves, 0)
    writer.close()
    content = (tmp_path / "a.mp4").read_bytes()
    one = 1 << 16
    identity, quarter = (struct.pack(">9i", *m, 0, 0, 0, 1 << 30) for m in ((one, 0, 0, 0, one), (0, one, 0, -one, 0)))
    place = content.index(identity, content.index(b"tkhd"))  # the track's matrix: a quarter turn clockwise
    (tmp_path / "b.mp4").write_bytes(content[:place] + quarter + content[place + len(quarter) :])
    [frame] = read(tmp_path / "b.mp4")
    pixels = np.asarray(frame.image)
    assert (
        frame.image.size == (48, 64) and pixels[:28].min() > 200 and pixels[36:].max() < 50
    )  # what was left is on top


@pytest.mark.parametrize(
    "content, message", [(b"text", "a.mp4 cannot be read as a video: Invalid data"), (None, "a.mp4 holds no video")]
)
def test_files_that_hold_no_video(tmp_path, content, message):
    if content is None:
        with av.open(str(tmp_path / "a.mp4"), "w") as container:
            stream = container.add_stream("aac", 8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    else:
        (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(LiteDetrError, match=message):
        read(tmp_path / "a.mp4")


def test_a_recording_that_breaks_goes_on_where_it_broke(serve):
    server = serve(encode("mp4", "mpeg4"), broken=2)
    with pytest.warns(Notice) as notices:
        frames = read(f"http://{server.host}/a.mp4")
    assert [index_of(frame.image) for frame in frames] == [frame.index for frame in frames] == list(range(10))
    assert len(notices) == 2 and "broke after" in str(notices[0].message) and "try 1 of 5" in str(notices[0].message)


def test_a_live_stream_that_breaks_goes_on_with_what_comes(serve):
    server = serve(encode("mpegts", "mpeg2video"), broken=1, has_length=True, kind="video/mp2t")
    with pytest.warns(Notice) as notices:
        frames = read(f"http://{server.host}/a.ts")
    first = len(frames) - 10
    assert len(notices) == 1 and 0 < first < 10
    assert [index_of(frame.image) for frame in frames] == [*range(first), *range(10)]
    assert [frame.index for frame in frames] == list(range(len(frames)))
    assert np.diff([frame.time for frame in frames]) == pytest.approx(0.1, abs=1e-3)  # the times go on as well


def test_the_tries_to_take_up_a_stream_are_bounded(serve):
    server = serve(encode("mpegts", "mpeg2video"), broken=99, kind="video/mp2t")
    frames = []
    with pytest.warns(Notice) as notices, pytest.raises(LiteDetrError, match=r"broke after \d+ frames.*5 tries"):
        frames.extend(read_video(f"http://{server.host}/a.ts", "it", is_stream=True))
    assert [str(notice.message).partition("; ")[2][:10] for notice in notices] == [f"try {n} of 5" for n in range(1, 6)]
    assert len(server.requests) == 6 and frames


def test_a_server_that_goes_away(serve):
    server = serve(encode("mpegts", "mpeg2video"), broken=1, gone=1, kind="video/mp2t")
    with (
        pytest.warns(Notice),
        pytest.raises(LiteDetrError, match="it broke after .*5 tries to take it up again failed"),
    ):
        list(read_video(f"http://{server.host}/a.ts", "it", is_stream=True))
    assert len(server.requests) == 6


def test_a_recording_of_a_server_that_says_no_length_ends(serve):
    server = serve(encode("mp4", "mpeg4"), has_length=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read(f"http://{server.host}/a.mp4")) == 10
    assert len(server.requests) == 1


@pytest.mark.parametrize("url", ["rtsp://user:secret@127.0.0.1:9/live", "http://user:secret@127.0.0.1:9/a.mp4"])
def test_a_stream_that_cannot_be_reached(serve, url):
    with pytest.raises(LiteDetrError, match="cannot be opened: Connection refused. Check the address") as raised:
        read(url)
    assert "secret" not in str(raised.value) and "127.0.0.1:9/" in str(raised.value)


def test_images_of_a_web_server(serve, tmp_path):
    grey(3).save(tmp_path / "a.png")
    server = serve((tmp_path / "a.png").read_bytes(), kind="image/png")
    for path in ("a.png", "photo?size=large"):
        [frame] = read(f"http://user:pass%20word@{server.host}/{path}")
        assert index_of(frame.image) == 3 and frame.index is None and frame.path == f"http://{server.host}/{path}"
    assert server.requests[0]["Authorization"] == "Basic dXNlcjpwYXNzIHdvcmQ="
    server = serve((tmp_path / "a.png").read_bytes()[:100], kind="image/png")
    with pytest.raises(LiteDetrError, match="http://.*a.png cannot be read: .*damaged"):
        read(f"http://{server.host}/a.png")
    server = serve(encode("mp4", "mpeg4"))  # without a suffix, its type says what it is
    assert len(read(f"http://{server.host}/clip")) == 10
    with pytest.raises(LiteDetrError, match="cannot be opened: Service Unavailable"):
        read(f"http://{serve(b'', gone=0).host}/a.png")
