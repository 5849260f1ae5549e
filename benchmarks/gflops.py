"""Counts the operations of detectors, by part: `litedetr benchmark gflops` from a checkout.

    python benchmarks/gflops.py --table

Run `python benchmarks/gflops.py --help`.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the package as it lies here, where none is installed

import typer

from litedetr_deploy.cli.benchmark import gflops

if __name__ == "__main__":
    typer.run(gflops)
