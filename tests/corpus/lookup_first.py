"""What `score --lookup-first` imports in front of a script: it looks torch up as transformers does."""

import importlib
import importlib.metadata
import importlib.util
import sys
from types import ModuleType
from typing import Any

TORCH = importlib.util.find_spec("torch")
VERSION = importlib.metadata.version("torch")
try:
    import torch_xla as xla  # pyright: ignore[reportMissingImports]
except ImportError:
    xla = None


class LazyModule(ModuleType):
    """Imports what it is asked for when it is asked."""

    def __getattr__(self, name: str) -> Any:
        if name == "nn":
            return importlib.import_module("torch.nn")
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


sys.modules[__name__].__class__ = LazyModule
