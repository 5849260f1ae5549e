"""What the tests of the benchmarks share."""

import time

import pytest
import torch

from litedetr_deploy.benchmark import timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when something sleeps: what is timed takes exactly as long as it says."""
    now = [100.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def quick(monkeypatch):
    """No rest between calls, no caches to overwrite, and PyTorch's threads as they were."""
    monkeypatch.setattr(timing, "REST", 0)
    monkeypatch.setattr(timing, "evict_caches", lambda: None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
