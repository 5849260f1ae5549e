"""Runs the tests of this folder without pytest: `python -m tests.gpu`.  Exits with 1 where one fails."""

import inspect
import sys
import traceback

import torch

from . import test_cuda_op


def main() -> int:
    if not torch.cuda.is_available():
        print("skipped: torch.cuda.is_available() is false")
        return 0
    passed, failed = 0, []
    for name, test in inspect.getmembers(test_cuda_op, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        for shape in test_cuda_op.SHAPES if "shape" in inspect.signature(test).parameters else [None]:
            try:
                test(shape) if shape else test()
                passed += 1
            except Exception:  # any failure of a test, to be told at the end
                failed.append(f"{name}[{shape}]" if shape else name)
                traceback.print_exc()
    print(f"{passed} passed, {len(failed)} failed", *failed, sep="\n")
    return 1 if failed else 0


sys.exit(main())
