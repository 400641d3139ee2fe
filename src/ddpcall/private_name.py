"""One private name of torch: how it is looked for, and the sentence where it is not there."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, ModuleType
from typing import Any

import torch

SEEN = ("2.11", "2.13", "2.14", "2.15")
_NOTHING: Any = object()


class TorchNameMissing(RuntimeError):
    """The installed torch lacks a private name; the message says which, and what is lost."""


@dataclass(frozen=True)
class Private:
    """One private name.

    Attributes:
        path: From `torch` to the name itself. The last part but one may be a class or function whose objects get
            the name as an attribute.
        purpose: What it is used for.
        without: What does not work where it is missing.
        rooms: Who uses it: watch, lab (probes and wrappers), ranks, compare.
        seen: Versions of torch that have it.
    """

    path: str
    purpose: str
    without: str
    rooms: tuple[str, ...] = ("watch",)
    seen: tuple[str, ...] = SEEN
    owner_path: str = field(init=False)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        """Split the path."""
        for attribute, value in zip(("owner_path", "name"), self.path.rsplit(".", 1), strict=True):
            object.__setattr__(self, attribute, value)

    def owner(self) -> Any:
        """Return the module or class the name is in, imported if need be.

        Raises:
            TorchNameMissing: It is not there.
        """
        try:
            return _resolve(self.owner_path, importlib.import_module)
        except (ImportError, AttributeError):
            raise TorchNameMissing(self.sentence()) from None

    def get(self, default: Any = _NOTHING) -> Any:
        """Return what the name stands for.

        Raises:
            TorchNameMissing: It is not there, and no default was given.
        """
        try:
            return _resolve(self.path, importlib.import_module)
        except (ImportError, AttributeError):
            if default is not _NOTHING:
                return default
            raise TorchNameMissing(self.sentence()) from None

    def if_imported(self) -> Any:
        """Return what the name stands for; None where it is not there or its module was not imported."""
        try:
            return _resolve(self.path, _look_for)
        except (ImportError, AttributeError):
            return None

    def of(self, owner: Any, default: Any = _NOTHING) -> Any:
        """Return the attribute of this name that an object, class or module has.

        Raises:
            TorchNameMissing: It has none, and no default was given.
        """
        value = getattr(owner, self.name, default)
        if value is _NOTHING:
            raise TorchNameMissing(self.sentence())
        return value

    def is_missing(self) -> bool:
        """Say whether torch is known to lack the name; nothing is imported to find out."""
        try:
            owner = _resolve(self.owner_path, _look_for)
            if isinstance(owner, ModuleType):
                _resolve(self.path, _look_for)
                return False
        except ImportError:
            return False  # not imported yet: nobody knows
        except AttributeError:
            return True
        return not hasattr(owner, self.name) and self.name not in _names_in(owner)

    def is_expected(self) -> bool:
        """Say whether this torch should have the name: it did when it was looked at, or is newer than that."""
        version = ".".join(torch.__version__.split(".")[:2])
        return version in self.seen or version not in SEEN

    def sentence(self) -> str:
        """Say that the name is missing, and what is lost."""
        return f"torch {torch.__version__} has no {self.path}: {self.without}"


def _resolve(path: str, import_module: Callable[[str], ModuleType]) -> Any:
    """Follow a dotted path; modules come first, since a package may hide one behind a function of its name."""
    parts = path.split(".")
    found: Any = torch
    for end in range(2, len(parts) + 1):
        prefix, part = ".".join(parts[:end]), parts[end - 1]
        if not isinstance(found, ModuleType):
            found = getattr(found, part)
        elif prefix in sys.modules:
            found = sys.modules[prefix]
        elif part in vars(found):  # not getattr: it would import torch._dynamo and others
            found = vars(found)[part]
        else:
            found = import_module(prefix)
    return found


def _look_for(name: str) -> ModuleType:
    """Raise ImportError where a module could be imported, AttributeError where there is none such."""
    parent = sys.modules[name.rpartition(".")[0]]
    if hasattr(parent, "__path__") and importlib.util.find_spec(name) is not None:
        raise ImportError(name)
    raise AttributeError(name)


def _names_in(owner: Any) -> set[str]:
    """Return the attributes that a class declares or that its methods, or a function, set on objects."""
    names: set[str] = set()
    for base in getattr(owner, "__mro__", (owner,)):
        names.update(vars(base).get("__annotations__", ()))
        for value in (base, *vars(base).values()):
            function = inspect.unwrap(getattr(value, "fget", value))  # whatever stands around it
            code = getattr(function, "__code__", None)
            names.update(_names_in_code(code) if isinstance(code, CodeType) else ())
    return names


def _names_in_code(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in_code(constant)
        elif isinstance(constant, str):
            yield constant


def require(*entries: Private) -> None:
    """Raise TorchNameMissing for the first of these names that torch is known to lack."""
    for entry in entries:
        if entry.is_missing():
            raise TorchNameMissing(entry.sentence())
