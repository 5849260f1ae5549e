"""`litedetr benchmark latency` from a checkout: run `python benchmarks/latency.py --help`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the package as it lies here, where none is installed

from litedetr_deploy.cli import main

if __name__ == "__main__":
    main(["benchmark", "latency", *sys.argv[1:]])
