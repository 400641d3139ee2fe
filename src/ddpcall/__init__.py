"""ddpcall: what `model.forward(x)` and `model.module(x)` lose in distributed PyTorch training.

Importing this package does no work: it patches nothing and imports neither torch nor Hydra. `ddpcall.watch` is
imported when it is first asked for, and so are `ddpcall.measure_mixing` and `ddpcall.same_as_one_process`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "watch":
        return importlib.import_module("ddpcall.watch")
    if name == "measure_mixing":
        return importlib.import_module("ddpcall.mixing").measure_mixing
    if name == "same_as_one_process":
        return importlib.import_module("ddpcall.compare").same_as_one_process
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
