"""Skips the modules that need a CUDA device where there is none; runs a test with a `shape` for all of its SHAPES."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_a_device(request):
    if request.module.NEEDS_DEVICE and not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is false")


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", metafunc.module.SHAPES, ids=str)
