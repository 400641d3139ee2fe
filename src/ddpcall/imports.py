"""Patch a module once it is imported, and not before: nobody pays for a library that the script never uses.

Finders, specs and loaders are those that the script sees without us, so it may look a module up in any form before
it imports it. Two functions are replaced: the one with which Python's own loaders execute a module's code, and the
one that `import` and `importlib.import_module` call for a module that is not in `sys.modules`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from importlib import _bootstrap, _bootstrap_external
from types import ModuleType
from typing import Any

Undo = Callable[[], None]
_BOOTSTRAP: Any = _bootstrap
_LOADER: Any = vars(_bootstrap_external)["_LoaderBasics"]
# Python leaves the import system's frames out of tracebacks, and puts no warning down to them.
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"


def after_import(name: str, patch: Callable[[ModuleType], Undo]) -> Undo:
    """Patch a module as soon as its code has run, now if it has; again when it is reloaded. Returns the undo.

    A module that is still being executed is patched when it is done. Other threads that import it meanwhile wait
    for the patch too, where one of Python's own loaders executes the module.

    Args:
        name: The module's full name.
        patch: Gets the module, returns the undo of what it did to it. An exception of its reaches the line that
            imports the module.

    Blind to: a module that a loader with an `exec_module` of its own executes without `import`; it is seen at the
        next import of any other.

    Source: `_find_and_load` in importlib/_bootstrap.py, `_LoaderBasics` in importlib/_bootstrap_external.py; both
        the same in Python 3.11 to 3.14.
    """
    awaited = _Awaited(name, patch)
    if not _all_awaited:
        _listening.enter_context(_listen())
    _all_awaited.append(awaited)
    awaited.look()

    def undo() -> None:
        if awaited in _all_awaited:
            _all_awaited.remove(awaited)
            if not _all_awaited:
                _listening.close()
            awaited.close()

    return undo


class _Awaited:
    """A module that is to be patched, and the undo once it is."""

    def __init__(self, name: str, patch: Callable[[ModuleType], Undo]) -> None:
        self.name = name
        self._patch = patch
        self._patched: ModuleType | None = None
        self._undo: Undo | None = None
        self._lock = threading.Lock()

    def look(self) -> None:
        """Patch the module if it is there, done and not patched."""
        module = sys.modules.get(self.name)
        if isinstance(module, ModuleType) and module is not self._patched and not _is_executing(module):
            with self._lock:
                is_another_thread_first, self._patched = self._patched is module, module
            if not is_another_thread_first:
                self._apply(module)

    def executed(self, module: ModuleType) -> None:
        """Patch the module, whose code has run: for the first time, or again because it is reloaded."""
        if sys.modules.get(self.name) is module:
            self._patched = module
            self._apply(module)
        else:  # a second copy, or it put something else in its place
            self.look()

    def _apply(self, module: ModuleType) -> None:
        self.close()
        self._undo = self._patch(module)

    def close(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


_all_awaited: list[_Awaited] = []
_listening = ExitStack()


def _listen() -> ExitStack:
    """Hear of executed modules and of first imports, until the stack is closed."""
    execute, find_and_load = _LOADER.exec_module, _BOOTSTRAP._find_and_load

    def exec_module(self: Any, module: ModuleType) -> None:
        execute(self, module)
        name = getattr(module.__spec__, "name", module.__name__)
        for awaited in list(_all_awaited):
            if awaited.name == name:
                awaited.executed(module)

    def _find_and_load(name: str, import_: Any) -> Any:
        module = find_and_load(name, import_)
        for awaited in list(_all_awaited):
            if awaited.name in sys.modules:
                awaited.look()
        return module

    with ExitStack() as stack:
        for owner, function in ((_LOADER, exec_module), (_BOOTSTRAP, _find_and_load)):
            function.__code__ = function.__code__.replace(co_filename=_IMPORT_SYSTEM)
            stack.callback(_restore, owner, function, getattr(owner, function.__name__))
            setattr(owner, function.__name__, function)
        return stack.pop_all()


def _restore(owner: Any, ours: Any, original: Any) -> None:
    if getattr(owner, ours.__name__) is ours:  # else somebody stands around it, and calls it
        setattr(owner, ours.__name__, original)


def _is_executing(module: ModuleType) -> bool:
    """Say whether a module's code is yet to end, or to begin: to look at a lazy module would execute it."""
    if type(module).__module__ == "importlib.util":
        return True
    attributes = vars(module)
    if getattr(attributes.get("__spec__"), "_initializing", False):
        return True
    # Who executes a module without `import` does not say so.
    for frame in sys._current_frames().values():  # pyright: ignore[reportPrivateUsage]
        while frame is not None:
            if frame.f_globals is attributes and frame.f_code.co_name == "<module>":
                return True
            frame = frame.f_back
    return False
