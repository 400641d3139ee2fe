"""Would one process have computed the same? A step of all ranks against one process, and two recorded runs.

Nothing is imported before it is asked for: the recorder runs scripts that have yet to import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpcall.compare.result import CAUSES, OneProcessComparison, ParameterNumbers
    from ddpcall.compare.same import same_as_one_process

__all__ = ["CAUSES", "OneProcessComparison", "ParameterNumbers", "same_as_one_process"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file = "same" if name == "same_as_one_process" else "result"
    return getattr(importlib.import_module(f"ddpcall.compare.{file}"), name)
