"""Times detectors on this machine, whole and by part: `litedetr benchmark latency` from a checkout.

    python benchmarks/latency.py lite-dino-r50-h3l1-2+1x3 dino-r50 --output benchmarks/results/latency

Run `python benchmarks/latency.py --help`.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the package as it lies here, where none is installed

import typer

from litedetr_deploy.cli.latency import latency

if __name__ == "__main__":
    typer.run(latency)
