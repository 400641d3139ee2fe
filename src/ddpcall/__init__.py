"""ddpcall: what `model.forward(x)` and `model.module(x)` lose in distributed PyTorch training.

Importing this package does no work: it patches nothing and imports neither torch nor Hydra. `ddpcall.watch` is
imported when it is first asked for, and so are `ddpcall.measure_mixing` and `ddpcall.same_as_one_process`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` returns, for type checkers and editors
    from ddpcall.compare import same_as_one_process as same_as_one_process
    from ddpcall.mixing import measure_mixing as measure_mixing
    from ddpcall.watch.session import watch as watch

__version__ = "0.2.0"  # the only place: pyproject.toml and the wheel read it here


def __getattr__(name: str) -> Any:
    if name == "watch":
        return importlib.import_module("ddpcall.watch")
    if name == "measure_mixing":
        return importlib.import_module("ddpcall.mixing").measure_mixing
    if name == "same_as_one_process":
        return importlib.import_module("ddpcall.compare").same_as_one_process
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
