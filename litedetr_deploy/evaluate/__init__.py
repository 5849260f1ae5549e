"""How right and how fast an artifact is on annotated images; callable, as `evaluate.evaluate.evaluate` is."""

import sys
from types import ModuleType


class _Callable(ModuleType):
    def __call__(self, artifact, data, *arguments, **options):
        from .evaluate import evaluate

        return evaluate(artifact, data, *arguments, **options)


sys.modules[__name__].__class__ = _Callable
