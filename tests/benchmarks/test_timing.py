"""The timing that the benchmarks share."""

import json
import time

import pytest
import torch

from litedetr_deploy.benchmark import timing
from litedetr_deploy.errors import LiteDetrError


def test_time_call_times_the_call_alone(clock, monkeypatch):
    monkeypatch.setattr(timing, "evict_caches", lambda: time.sleep(7))
    for options, calls in (({}, 2), ({"cold": True}, 1), ({"warm": False}, 1)):
        before = clock[0]
        assert timing.time_call(lambda: time.sleep(0.05), **options) == pytest.approx(0.05)
        rest = timing.REST + (7 if "cold" in options else 0)
        assert clock[0] - before == pytest.approx(rest + 0.05 * calls)


def test_more_threads_than_cores_are_refused(monkeypatch):
    monkeypatch.setattr(timing, "usable_cores", lambda: 4)
    timing.check_threads([1, 4])
    for threads in (0, 5):
        with pytest.raises(LiteDetrError, match=f"--threads is {threads}; this machine has 4 cores"):
            timing.check_threads([1, threads])


def test_percentile():
    assert timing.percentile([7.0], 90) == 7.0
    assert timing.percentile([4, 1, 3, 2], 50) == 2.5
    assert timing.percentile([4, 1, 3, 2], 90) == pytest.approx(3.7)  # rank 2.7
    assert timing.percentile([30, 10, 20], 50) == 20
    assert timing.percentile([30, 10, 20], 90) == pytest.approx(28)  # rank 1.8
    assert timing.percentile([30, 10, 20], 100) == 30


@pytest.mark.parametrize(
    "seconds, budget, wanted", [(0.5, 10.0, 20), (4.0, 10.0, timing.FEWEST), (0.001, 10.0, timing.MOST)]
)
def test_repetitions_fit_the_budget(monkeypatch, seconds, budget, wanted):
    clock = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls = []
    assert timing.repetitions(lambda: calls.append(1), budget) == wanted
    assert len(calls) == 1


class Device:
    """A CUDA device whose host takes `host` cycles for a call and whose call takes 2 ms; it logs what it is asked."""

    def __init__(self, host, monkeypatch):
        self.host, self.log = host, []
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.log.append)
        monkeypatch.setattr(timing, "evict_caches", lambda device: self.log.append("evict"))

    def event(self, enable_timing):
        class Event:
            record = synchronize = lambda event: None
            query = lambda event: self.host > [entry for entry in self.log if isinstance(entry, int)][-1]  # noqa: E731
            elapsed_time = lambda event, end: 2.0  # noqa: E731

        return Event()

    def call(self):
        self.log.append("call")


def test_device_waits_for_the_host(monkeypatch):
    device = Device(host=0, monkeypatch=monkeypatch)
    assert timing.time_device_call(device.call) == 0.002
    assert timing.time_device_call(device.call, cold=True) == 0.002
    assert device.log == ["call", timing.WAIT, "call", "evict", timing.WAIT, "call"]
    device = Device(host=timing.WAIT * 3, monkeypatch=monkeypatch)
    assert timing.time_device_call(device.call) == 0.002
    assert device.log == ["call", timing.WAIT, "call"] + ["call", timing.WAIT * 4, "call"]


def test_a_call_that_waits_for_the_device_is_not_timed(monkeypatch):
    with pytest.raises(RuntimeError, match="waits for the device"):
        timing.time_device_call(Device(host=10**18, monkeypatch=monkeypatch).call)


def test_equal_counts_make_a_round_robin():
    assert timing.interleave({"a": 3, "b": 3}) == ["a", "b"] * 3


def test_unequal_counts_are_spread_evenly():
    order = timing.interleave({"fast": 40, "slow": 4})
    assert (order.count("fast"), order.count("slow")) == (40, 4)
    quarters = [order[start : start + 11] for start in range(0, 44, 11)]
    assert [quarter.count("slow") for quarter in quarters] == [1, 1, 1, 1]


def test_evicting_passes_through_more_memory_than_the_caches_hold():
    timing.evict_caches()
    assert timing._cache_sized_buffer().nbytes >= timing.cache_bytes() - 8 > 0


def test_machine_is_described_in_json():
    machine = json.loads(json.dumps(timing.machine(["pytest", "no-such-package"])))
    assert machine["packages"] == {"pytest": pytest.__version__}
    assert machine["cores"] >= 1 and len(machine["load_average"]) == 3
    assert {"cpu", "cpu_features", "cache_mib", "memory_gib", "os", "python", "date"} <= set(machine)
