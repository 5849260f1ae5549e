"""How right and how fast is an artifact on annotated images?

The package is callable: `litedetr_deploy.evaluate(artifact, data)` is `evaluate.evaluate.evaluate`.
"""

import sys
from types import ModuleType


class _Callable(ModuleType):
    def __call__(self, artifact, data, *arguments, **options):
        from .evaluate import evaluate

        return evaluate(artifact, data, *arguments, **options)


sys.modules[__name__].__class__ = _Callable
