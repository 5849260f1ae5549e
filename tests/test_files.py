"""Files that appear complete or not at all, and what a killed process leaves."""

import os
import signal
import subprocess
import sys

import pytest

from litedetr_deploy import errors, files, machine


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "new.txt"
    with files.replaced_when_done(path) as temporary:
        temporary.write_text("text")
        assert not path.exists() and temporary.parent == tmp_path
    assert path.read_text() == "text" and os.listdir(tmp_path) == ["new.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "old.txt"
    path.write_text("old")
    with pytest.raises(error), files.replaced_when_done(path) as temporary:
        temporary.write_text("new")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["old.txt"]


def test_a_folder_that_is_not_there(tmp_path):
    with (
        pytest.raises(errors.LiteDetrError, match="cannot be written: No such file or directory"),
        files.replaced_when_done(tmp_path / "gone" / "file"),
    ):
        pass
    with pytest.raises(errors.LiteDetrError, match="does not exist"):
        files.check_writable(tmp_path / "gone")


@pytest.mark.parametrize("what", ["replaced_when_done", "folder_beside"])
def test_what_a_killed_process_left_goes_with_the_next_run(tmp_path, what):
    code = (
        "import os, sys; from litedetr_deploy import files\n"
        f"with files.{what}(sys.argv[1]) as temporary: os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model.onnx"], cwd=os.getcwd())
    assert done.returncode == -signal.SIGKILL
    [left] = os.listdir(tmp_path)
    assert left.startswith(".model.onnx.")
    (tmp_path / ".hidden").write_text("of somebody else")
    with files.replaced_when_done(tmp_path / "other.json") as mine, files.replaced_when_done(tmp_path / "third"):
        assert mine.exists()  # that of a process that runs stays
    assert sorted(os.listdir(tmp_path)) == [".hidden", "other.json", "third"]


def test_threads_are_bounded_by_the_machine():
    assert machine.bounded_threads(None) is None and machine.bounded_threads(1) == 1
    with pytest.warns(errors.Notice, match="100000 threads are asked for"):
        assert machine.bounded_threads(100_000) == machine.usable_cores()
    with pytest.raises(errors.LiteDetrError, match="threads is 0"):
        machine.bounded_threads(0)


def test_control_characters_are_escaped():
    assert errors.printable("a\nb\x1b[31m\u202e\udcff é 日") == r"a\nb\x1b[31m\u202e\udcff é 日"


def test_the_nearest_word():
    assert errors.nearest("opp", ["op", "gather"]) == " Did you mean 'op'?"
    assert errors.nearest("lite-dino-r5O", ["lite-dino-r50", "dino-r50"]) == " Did you mean 'lite-dino-r50'?"
    assert errors.nearest("magic", ["op", "gather"]) == ""


def test_the_extra_of_a_missing_package():
    error = errors.not_installed(ModuleNotFoundError("No module named 'torch'", name="torch._C"), "Export")
    assert "Export needs torch" in str(error) and "`pip install litedetr-deploy[export]`" in str(error)
    assert errors.not_installed(ModuleNotFoundError("No module named 'x'", name="x")) is None
