"""The harness that all benchmarks share: turns, checks, troubles, what is kept, and the reports' pieces."""

import json
import time

import pytest

from litedetr_deploy.artifact import Store
from litedetr_deploy.benchmark import harness, report, timing
from litedetr_deploy.benchmark.harness import FAILED, MEASURED, MISSING, WRONG, Contender, Settings, measure

pytestmark = pytest.mark.usefixtures("clock")


class Sleeper(Contender):
    """Takes so many seconds, and notes its calls in a log that others share."""

    def __init__(self, name, seconds=0.5, log=None, missing="", wrong=""):
        self.name = self.key = name
        self.seconds, self.log, self._missing, self._wrong = seconds, [] if log is None else log, missing, wrong

    def missing(self):
        return self._missing

    def call(self):
        self.log.append(self.name)
        time.sleep(self.seconds)

    def check(self, result):
        result.figures["checked"] = True
        return self._wrong

    def close(self):
        self.log.append(f"{self.name} closed")


def test_a_call_of_known_duration():
    (result,) = measure([Sleeper("a", 0.5)], Settings(seconds=0))
    assert result.seconds == pytest.approx([0.5] * timing.FEWEST) and result.status == MEASURED
    assert result.median == pytest.approx(0.5) and result.milliseconds()["p99_ms"] == pytest.approx(500)
    sleeper = Sleeper("b", 0.05)
    sleeper.images = 3
    assert sleeper.keep_running(0.12) == (9, pytest.approx(0.15))


def test_contenders_are_timed_in_turns():
    log = []
    first, second = measure([Sleeper("a", 0.5, log), Sleeper("b", 0.6, log)], Settings(seconds=0))
    assert log[-8:] == ["a", "b"] * 3 + ["a closed", "b closed"]
    assert first.median == pytest.approx(0.5) and second.median == pytest.approx(0.6)


def test_a_short_call_follows_an_untimed_one():
    for seconds, calls in ((0.5, 1), (0.1, 2)):
        sleeper = Sleeper("a", seconds)
        sleeper.time()  # the first
        sleeper.log.clear()
        assert sleeper.time()[0] == pytest.approx(seconds)
        assert len(sleeper.log) == calls


def test_cold_calls_are_timed_as_well(monkeypatch):
    log = []
    monkeypatch.setattr(timing, "evict_caches", lambda: log.append("evicted"))
    (result,) = measure([Sleeper("a", 0.1, log)], Settings(seconds=0, cold=True))
    assert len(result.cold_seconds) == len(result.seconds) == timing.FEWEST
    assert log.count("evicted") == timing.FEWEST + 1
    assert all(log[place + 1] == "a" for place, entry in enumerate(log) if entry == "evicted")


def test_wrong_and_missing_contenders_are_not_timed():
    log = []
    wrong, absent, right = measure(
        [Sleeper("a", log=log, wrong="off by 1"), Sleeper("b", log=log, missing="no b here"), Sleeper("c")],
        Settings(seconds=0),
    )
    assert (wrong.status, wrong.trouble, wrong.seconds) == (WRONG, "off by 1", [])
    assert (absent.status, absent.trouble, absent.seconds) == (MISSING, "no b here", [])
    assert right.status == MEASURED and "a" not in log and "a closed" in log


@pytest.mark.parametrize("broken", ["open", "check", "time", "parts", "finish"])
def test_a_contender_that_fails_leaves_the_others(broken):
    def fail(*arguments):
        raise RuntimeError("it broke\nand more")

    contender = Sleeper("a")
    setattr(contender, broken, fail)
    failed, right = measure([contender, Sleeper("b")], Settings(seconds=0))
    assert (failed.status, failed.trouble, failed.seconds) == (FAILED, "RuntimeError: it broke", [])
    assert right.status == MEASURED and len(right.seconds) == timing.FEWEST


def test_at_most_so_many_are_open_at_once():
    log = []
    measure([Sleeper(name, log=log) for name in "abc"], Settings(seconds=0, at_once=2))
    assert log.index("a closed") < log.index("c") and log.index("b") < log.index("a closed")


def test_an_interruption_leaves_what_was_measured():
    log = []

    class Interrupted(Sleeper):
        def call(self):
            super().call()
            if log.count("a") == 3:  # the estimate and one timed call were before it
                raise KeyboardInterrupt

    results = []
    with pytest.raises(KeyboardInterrupt):
        measure([Interrupted("a", log=log), Sleeper("b", log=log)], Settings(seconds=0), results=results)
    assert [len(result.seconds) for result in results] == [1, 1]
    assert [result.status for result in results] == [harness.INTERRUPTED] * 2
    assert log[-2:] == ["a closed", "b closed"]


def test_a_run_resumes(tmp_path):
    path, settings = tmp_path / "store", Settings(seconds=0, at_once=1)
    first = measure([Sleeper("a"), Sleeper("b", wrong="off")], settings, store=Store(path, "run"))
    log = []
    contenders = [Sleeper(name, log=log) for name in "abc"]
    again = measure(contenders, settings, store=Store(path, "run"))
    assert again[:2] == first and set(log) == {"c", "c closed"}
    assert again[2].status == MEASURED
    measure(contenders, settings, store=Store(path, "another run"))
    assert "a" in log


def test_the_sensors_are_read_while_each_runs(monkeypatch):
    class Sensors:
        used = 100

        def memory_used(self):
            self.used += 50
            return self.used

    monkeypatch.setattr(harness.power, "watch", lambda sensors, work: {"images": work()[0]})
    (result,) = measure([Sleeper("a", 1.0)], Settings(seconds=0), sensors=Sensors())
    assert result.device_memory_bytes == 50 and result.power == {"images": harness.POWER_SECONDS}


# Reports


def test_a_table_is_padded_and_remarks_follow():
    lines = report.table(("contender", "ms"), [["a | b", "1.50"], ["c", "2", "three"], ["longer name", "12.0"]])
    assert lines == [
        "",
        "| contender   |   ms |",
        "| ----------- | ---: |",
        "| a \\| b      | 1.50 |",
        "| longer name | 12.0 |",
        "",
        "- c: 2: three",
    ]
    assert report.table(("contender", "ms", "calls"), [["c", "no | time"]]) == ["", "- c: no \\| time"]


@pytest.mark.parametrize(
    "number, text", [(None, "-"), (0.0, "0"), (0.01234, "0.0123"), (1.0, "1.00"), (56.78, "56.8"), (1234.5, "1234")]
)
def test_three_digits(number, text):
    assert report.three_digits(number) == text


def test_reports_are_written_together_or_not_at_all(tmp_path):
    def fail(path):
        raise RuntimeError("no chart")

    pytest.importorskip("matplotlib")
    with pytest.raises(RuntimeError):
        report.write(tmp_path / "v1.2", {}, ["# Title"], fail)
    assert not list(tmp_path.iterdir())
    paths = report.write(tmp_path / "v1.2", {"a": 1}, ["# Title"])
    assert [path.name for path in paths] == ["v1.2.json", "v1.2.md"] and json.loads(paths[0].read_text()) == {"a": 1}
