"""The watch: finds, in code it has never seen, the lines that train a different model on every rank.

`ddpcall.watch` is both this package and the function that starts a watch:

    with ddpcall.watch(on_finding="warn") as session: ...
    session = ddpcall.watch(ddp_model)

The package is callable because a function of the same name would be hidden by the first import from it.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

from ddpcall.torch_version import require_torch


class _Watch(ModuleType):
    def __call__(self, model: Any = None, **options: Any) -> Any:
        """Start watching; see `ddpcall.watch.session.watch`."""
        require_torch()
        from ddpcall.watch.session import watch

        return watch(model, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        """The function's own signature, for `inspect`, `help` and notebooks."""
        from ddpcall.watch.session import watch

        return inspect.signature(watch)


sys.modules[__name__].__class__ = _Watch
