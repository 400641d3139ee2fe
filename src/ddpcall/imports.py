"""Patch a module once it is imported, and not before: nobody pays for a library that the script never uses."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

Undo = Callable[[], None]


def after_import(name: str, patch: Callable[[ModuleType], Undo]) -> Undo:
    """Patch a module as soon as it has been imported, now if it is already there; returns the undo.

    Args:
        name: The module's full name.
        patch: Gets the module, returns the undo of what it did to it.
    """
    undos: list[Undo] = []
    if name in sys.modules:
        return patch(sys.modules[name])
    finder = _PatchingFinder(name, lambda module: undos.append(patch(module)))
    sys.meta_path.insert(0, finder)

    def undo() -> None:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        for undo_patch in undos:
            undo_patch()

    return undo


class _PatchingFinder:
    """Stands before the import system's finders for one module, and calls back after it was executed."""

    def __init__(self, name: str, executed: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._executed = executed

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._name:
            return None
        sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        execute, executed = loader.exec_module, self._executed

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            executed(module)

        loader.exec_module = exec_module
        return spec
