"""The smallest taps: an attribute, a method, a handle; and what every tap needs to know of its surroundings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddpcall import torch_internals as internals

Undo = Callable[[], None]


def wrap_method(owner: Any, name: str, wrapping: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Undo:
    """Replace a method on one instance by `wrapping(original)`.

    Args:
        owner: The instance; its class is left alone.
        name: The method's name.
        wrapping: Gets the bound original, returns the callable to put in its place.

    Returns:
        The undo: restores the instance's `__dict__` entry, or its absence.

    Blind to: calls through the class, such as `type(m).forward(m, x)`.
    """
    had_own = name in owner.__dict__
    original = owner.__dict__[name] if had_own else partial(_call_class_method, owner, name)
    owner.__dict__[name] = wrapping(original)

    def undo() -> None:
        if had_own:
            owner.__dict__[name] = original
        else:
            owner.__dict__.pop(name, None)

    return undo


def _call_class_method(owner: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Look the method up when it is called: lazy modules change their class in their first forward."""
    try:
        method = getattr(type(owner), name)
    except AttributeError:  # TorchScript's modules have their methods in __getattr__
        return owner.__getattr__(name)(*args, **kwargs)
    return method(owner, *args, **kwargs)


def replace_attribute(owner: Any, name: str, value: Any) -> Undo:
    """Put a value in an owner's own `__dict__` (class, module or instance) and return the undo.

    The undo leaves alone what somebody else has put in its place since.
    """
    had_own = name in vars(owner)
    original = vars(owner).get(name)
    setattr(owner, name, value)

    def undo() -> None:
        if vars(owner).get(name) is not value:
            return
        if had_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)

    return undo


def hear_calls(
    owner: Any,
    name: str,
    before: Callable[..., object] | None = None,
    after: Callable[..., object] | None = None,
    *,
    is_traced: bool = True,
) -> Undo:
    """Hear of every call of a function or method, looked up on its owner; return the undo.

    Calls that dynamo traces are not heard of.

    Args:
        owner: The class or module that has it.
        name: Its name there.
        before: Gets the arguments.
        after: Gets the result, then the arguments.
        is_traced: Whether dynamo may look into it; of what it should not, it calls the original.
    """
    original, is_compiling = getattr(owner, name), torch.compiler.is_compiling

    @functools.wraps(original)
    def heard(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return original(*args, **kwargs)
        if before is not None:
            before(*args, **kwargs)
        result = original(*args, **kwargs)
        if after is not None:
            after(result, *args, **kwargs)
        return result

    return replace_attribute(owner, name, heard if is_traced else internals.disable_dynamo(heard, recursive=False))


def undo_all(undos: Iterable[Undo]) -> Undo:
    """Return one undo for several, the last first; where one cannot be made, those before it are called."""
    with ExitStack() as stack:
        for undo in undos:
            stack.callback(undo)
        return stack.pop_all().close


def remove_handles(*handles: Any) -> Undo:
    """Return the undo of torch's own registrations."""

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def in_backward() -> bool:
    """Say whether this thread is running a backward."""
    return internals.graph_task() != -1


def find_tensors(values: Any, depth: int = 4) -> list[Tensor]:
    """Return the tensors in nested tuples, lists, dicts and plain objects, at most `depth` levels down."""
    if isinstance(values, Tensor):
        return [values]
    if depth == 0 or isinstance(values, nn.Module | str | bytes | int | float | None):
        return []
    if isinstance(values, dict):
        values = tuple(values.values())
    elif not isinstance(values, tuple | list | set):
        values = tuple(getattr(values, "__dict__", {}).values())
    return [tensor for value in values for tensor in find_tensors(value, depth - 1)]
