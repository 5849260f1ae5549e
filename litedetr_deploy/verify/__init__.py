"""One verdict: what differs, by how much, against what yardstick, and whether an artifact passed.

The package is callable: `litedetr_deploy.verify(artifact, against)` is the function in `verify.verify`.
"""

import sys
from types import ModuleType


class _Callable(ModuleType):
    def __call__(self, artifact, against, *arguments, **options):
        from .verify import verify

        return verify(artifact, against, *arguments, **options)


sys.modules[__name__].__class__ = _Callable
