"""Times one key-aware deformable attention, our op against what else can compute it; see --help."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the package as it lies here, where none is installed

from litedetr_deploy.errors import not_installed

try:
    from litedetr_deploy.benchmark.kernels import main
except ImportError as error:
    sys.exit(f"error: {not_installed(error) or error}")

if __name__ == "__main__":
    sys.exit(main())
