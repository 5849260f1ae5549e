"""The two attention ops: each defined once, then bound to PyTorch, to ONNX and to the native library.

Importing this package loads neither torch nor onnx; its modules are loaded when they are first named.
"""

import importlib

_MODULES = ("lowering", "native", "onnx_schema", "reference", "schema", "torch_op")


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_MODULES])
