"""What a source is, and how it is read ahead."""

import io
import sys
import threading
from types import SimpleNamespace

import pytest

from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.runtime.sources import ahead, find_sources

from .clips import encode, grey, index_of, save_gif


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.jpg", "in/c.png", "in/deep/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        grey(0).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "clip.mp4").write_bytes(b"")
    return tmp_path


def names(folder, given, recursive=False):
    return [str(source.file.relative_to(folder)) for source in find_sources(given, recursive)]


def test_folders_and_patterns(folder):
    assert names(folder, folder) == ["a.jpg", "b.png", "clip.mp4"]
    everything = ["a.jpg", "b.png", "clip.mp4", "in/c.png", "in/deep/d.png"]
    assert names(folder, str(folder), recursive=True) == everything
    assert names(folder, f"{folder}/*") == ["a.jpg", "b.png", "clip.mp4"]
    assert names(folder, f"{folder}/**/*.png") == ["b.png", "in/c.png", "in/deep/d.png"]
    assert names(folder, [folder / "b.png", f"{folder}/?.jpg"]) == ["b.png", "a.jpg"]
    assert [source.kind for source in find_sources(folder)] == ["image", "image", "video"]


def test_a_file_may_be_named_like_a_pattern_or_a_camera(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in ("[1].png", "7"):
        grey(0).save(folder / name, format="PNG")
        assert [str(source.file) for source in find_sources(name)] == [name]


@pytest.mark.parametrize(
    "given, message",
    [
        ("gone.png", "gone.png: the path does not exist. Check it"),
        ("*.bmp", "The pattern .*bmp matches no image and no video"),
        ("empty", "holds no image and no video .*--recursive"),
        ("ftp://host/a.png", "is no URL that can be opened"),
        ("rtsp://", "is no URL that can be opened"),
        ("987", "The camera 987 does not exist: /dev/video987 is missing"),
        (987, "The camera 987 does not exist"),
    ],
)
def test_a_source_that_is_nothing(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "in").mkdir(parents=True)
    with pytest.raises(LiteDetrError, match=message):
        find_sources(given)


def test_standard_input(monkeypatch, tmp_path):
    def piped(content):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        [source] = find_sources("-")
        return list(source.read())

    file = io.BytesIO()
    grey(2).save(file, "PNG")
    [frame] = piped(file.getvalue())
    assert index_of(frame.image) == 2 and frame.index is None and frame.path == "standard input"
    assert [index_of(frame.image) for frame in piped(save_gif(tmp_path / "a.gif").read_bytes())] == [0, 1, 2]
    with pytest.raises(LiteDetrError, match="Standard input is empty"):
        piped(b"")
    pytest.importorskip("av")
    assert [index_of(frame.image) for frame in piped(encode("matroska", "mpeg4"))] == list(range(10))
    with pytest.raises(LiteDetrError, match="standard input cannot be read as a video: Invalid data"):
        piped(b"text")


def test_ahead_keeps_the_order_and_takes_a_bounded_number():
    taken, may_end, reached = [], threading.Event(), threading.Event()

    def items():
        for item in range(20):
            taken.append(item)
            if len(taken) == 4:
                reached.set()
            yield item

    items = ahead(items(), 3)
    assert next(items) == 0
    assert reached.wait(10)  # the thread goes on meanwhile ...
    may_end.wait(0.05)
    assert len(taken) == 4  # ... but not too far: one that was given, and three
    assert list(items) == list(range(1, 20))


def test_ahead_carries_errors_and_ends_what_it_takes_from():
    ended = threading.Event()

    def items():
        try:
            yield 1
            yield 2
            raise LiteDetrError("it broke")
        finally:
            ended.set()

    found = []
    with pytest.raises(LiteDetrError, match="it broke"):
        for item in ahead(items(), 9):
            found.append(item)
    assert found == [1, 2] and ended.wait(10)
    ended.clear()
    taken = ahead(items(), 1)
    assert next(taken) == 1
    taken.close()
    assert ended.wait(10)
