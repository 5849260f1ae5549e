"""The timing that the benchmarks share."""

import json
import time

import pytest
import timing


def test_time_call_times_the_call_alone():
    fastest = min(timing.time_call(lambda: time.sleep(0.05)) for _ in range(5))
    assert 0.05 <= fastest < 0.05 + timing.REST


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
    monkeypatch.setattr(timing, "time_call", lambda call, cold: call())
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls = []
    assert timing.repetitions(lambda: calls.append(1), budget) == wanted
    assert len(calls) == 1


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
