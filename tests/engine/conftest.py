import pytest

from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.runtime import cuda


@pytest.fixture
def no_gpu(monkeypatch):
    """The machine has no GPU, whatever it has."""

    def find_gpu():
        raise LiteDetrError("no GPU here")

    monkeypatch.setattr(cuda, "find_gpu", find_gpu)


@pytest.fixture
def rtx(no_gpu):
    """Skip where TensorRT-RTX is not installed."""
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")
