"""JSON into frozen dataclasses, by their annotations: what does not fit is an error that says where."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Misfit(ValueError):
    """A value that is not what its place asks for."""


class NothingToShow(Exception):
    """There is nothing at a path that a report could be made of: one message, with what to write instead."""


def describe_error(error: Exception) -> str:
    """Return why a file could not be read, without its name."""
    return getattr(error, "strerror", None) or str(error)


def read_record(kind: type[T], value: Any, place: str = "") -> T:
    """Build a dataclass from a JSON object; fields it does not know are left out, so newer files can be read.

    Args:
        kind: A dataclass.
        value: What `json.loads` returned.
        place: Where it stood, for the message.

    Raises:
        Misfit: A field without a default is missing, or a value has another type than its annotation.
    """
    if not isinstance(value, dict):
        raise Misfit(f"{place or kind.__name__}: {_shorten(value)} is not an object")
    hints = _hints(kind)
    known = {name: _read(hint, value[name], f"{place}.{name}") for name, hint in hints.items() if name in value}
    try:
        return kind(**known)
    except TypeError as error:
        raise Misfit(f"{place or kind.__name__}: {error}") from None


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _read(hint: Any, value: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in arguments:
            return None
        return _read(next(kind for kind in arguments if kind is not types.NoneType), value, place)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return read_record(hint, value, place)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_read(arguments[0], item, place) for item in value)
    if origin is dict and isinstance(value, dict):
        return {str(key): _read(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    return _read_scalar(hint, value, place)


def _read_scalar(hint: Any, value: Any, place: str) -> Any:
    if hint is float and (number := read_number(value)) is not None:
        return number
    if hint in (str, bool, int) and type(value) is hint:
        return value
    raise Misfit(f"{place}: {_shorten(value)} is not {getattr(hint, '__name__', hint)}")


def read_number(value: Any) -> float | None:
    """Return a JSON number as a float, also the words that stand for what JSON has no number for; else None."""
    if isinstance(value, str):
        return _NON_FINITE.get(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
