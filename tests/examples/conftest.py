"""The examples are scripts: their folders are importable here, as they are where they run."""

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="package", autouse=True)
def scripts():
    folders = [str(EXAMPLES), str(EXAMPLES / "shapes")]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)
