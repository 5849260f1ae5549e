"""Deployment of Lite DETR and other deformable-attention detectors.

Importing this package needs numpy alone: everything heavier is imported by the name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import ops as ops
    from .engine.build import build_engine as build_engine
    from .errors import LiteDetrError as LiteDetrError
    from .evaluate.evaluate import evaluate as evaluate
    from .export.export import export_onnx as export_onnx
    from .fuse.fuse import fuse_onnx as fuse_onnx
    from .model.checkpoints import load_model as load_model
    from .model.checkpoints import save_checkpoint as save_checkpoint
    from .ops import native as native
    from .runtime.detector import Detector as Detector
    from .runtime.session import create_session as create_session
    from .verify.verify import verify as verify

__version__ = "0.1.0"

_NAMES = {
    "load_model": "model.checkpoints", "save_checkpoint": "model.checkpoints", "export_onnx": "export.export",
    "fuse_onnx": "fuse.fuse", "build_engine": "engine.build", "create_session": "runtime.session",
    "Detector": "runtime.detector", "LiteDetrError": "errors",
}  # fmt: skip
_MODULES = {"native": "ops.native", "ops": "ops", "evaluate": "evaluate", "verify": "verify"}  # two are callable

__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str):
    if name in _NAMES:
        return getattr(import_module(f".{_NAMES[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{_MODULES[name]}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
