"""Name the line of the user's code that is running."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch


@dataclass(frozen=True, order=True)
class CallSite:
    """A line of the user's code, or of a library that the user's code called.

    Attributes:
        file: Path as Python knows it.
        line: From 1; 0 when unknown.
        function: Name of the function the line stands in; `<module>` at the top level.
        called_from: The user's line that led there, where this one does not say it: the call into an installed
            library, or the hook that a trainer called. Sites that differ in this alone are the same.
    """

    file: str
    line: int
    function: str
    called_from: CallSite | None = field(default=None, compare=False)


NOWHERE = CallSite("", 0, "")


def read_site(values: Mapping[str, Any]) -> CallSite:
    """Return a site from what `dataclasses.asdict` made of it."""
    caller = values["called_from"]
    return CallSite(
        values["file"], values["line"], values["function"], None if caller is None else read_site(caller)
    )


TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = str(Path(__file__).resolve().parents[1]) + os.sep
_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep
_COMMANDS = sysconfig.get_path("scripts") + os.sep
# Neither is ever the line to change: the first pass calls on as they come, the second call the user's hooks.
_PASSING_ON = ("/accelerate/", "/lightning/fabric/", "/lightning_fabric/")
_TRAINERS = ("/lightning/pytorch/", "/pytorch_lightning/")


@functools.lru_cache(maxsize=4096)
def is_user_file(file: str) -> bool:
    """Say whether a line of a file may be named: not torch's, ours, Python's or a wrapper library's."""
    if file.startswith((TORCH, _OURS, "<frozen", "<eval_with_key>")):  # the last: code that torch.fx wrote
        return False
    if file.startswith(_STANDARD_LIBRARY) and not is_installed_file(file):
        return False
    return not _is_in(file, _PASSING_ON + _TRAINERS)


def is_installed_file(file: str) -> bool:
    """Say whether a file is an installed package's; what is installed editable stays where the user writes it."""
    return "/site-packages/" in file or "/dist-packages/" in file


def _is_in(file: str, packages: tuple[str, ...]) -> bool:
    return is_installed_file(file) and any(part in file for part in packages)


def find_call_site(inside: Callable[[Any], bool] | None = None) -> CallSite:
    """Return the line of the user's code that is running.

    Args:
        inside: Says of an object whether it belongs to the model. With it, the site is where the model was
            entered from: the caller of the outermost frame whose first argument belongs to the model.

    Returns:
        The innermost line outside the model, on an autograd worker thread the main thread's. Where that is an
        installed library's, `called_from` is the user's. Where the model is the trainer's own kind of object (a
        LightningModule) and the trainer called it, the user's innermost line inside the model.

    Blind to: frames of static methods and free functions of the model below its outermost method.
    """
    return site_of(*find_call_frames(inside))


def find_call_frames(inside: Callable[[Any], bool] | None = None) -> tuple[FrameType | None, FrameType | None]:
    """Return the frames that `find_call_site` names: the line's, and the one of `called_from`."""
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    if threading.current_thread() is not threading.main_thread() and not _has_user_frame(frame):
        frame = sys._current_frames().get(threading.main_thread().ident or 0)  # pyright: ignore[reportPrivateUsage]
    return find_call_frames_among(_outward(frame), inside)


def find_call_frames_among(
    frames: Iterable[FrameType], inside: Callable[[Any], bool] | None = None
) -> tuple[FrameType | None, FrameType | None]:
    """Return the line among frames, innermost first, and the one it is called from; see `find_call_site`."""
    within: list[FrameType] = []
    around: list[FrameType] = []
    model: Any = None
    for frame in frames:
        file = frame.f_code.co_filename
        if inside is not None and inside(candidate := _bound_object(frame)):
            model = candidate
            within += [*around, frame]
            around = []
        elif is_user_file(file) or _is_in(file, _TRAINERS):
            around.append(frame)
            if inside is None and _is_own(frame):
                break
    own = [frame for frame in within if _is_own(frame)]
    if own and around and _is_trainer_of(model, around[0]):
        return own[0], own[-1] if own[-1].f_code is not own[0].f_code else None
    named = [frame for frame in around if is_user_file(frame.f_code.co_filename)] or own
    if not named or _is_own(named[0]):
        return next(iter(named), None), None
    return named[0], next(filter(_is_own, named), None)


def _is_own(frame: FrameType) -> bool:
    """Say whether a frame runs code that the user writes: in no installed package, and not a command's stub."""
    file = frame.f_code.co_filename
    return is_user_file(file) and not is_installed_file(file) and not file.startswith(_COMMANDS)


def _is_trainer_of(model: Any, frame: FrameType) -> bool:
    """Say whether a frame runs the library whose kind of object the model is (a LightningModule, Lightning)."""
    if not is_installed_file(frame.f_code.co_filename):
        return False
    library = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return any(kind.__module__.partition(".")[0] == library for kind in type(model).__mro__)


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _bound_object(frame: FrameType) -> Any:
    """Return the object whose method a frame runs; None for a function, though it may take the model first."""
    code = frame.f_code
    if not code.co_argcount:
        return None
    first = frame.f_locals.get(code.co_varnames[0])
    if code.co_varnames[0] == "self":
        return first
    method = inspect.unwrap(getattr(type(first), code.co_name, None) or len)
    return first if getattr(method, "__code__", None) is code else None


def site_of(frame: FrameType | None, caller: FrameType | None = None) -> CallSite:
    """Return the line a frame is at, and the one it is called from; NOWHERE without a frame."""
    if frame is None:
        return NOWHERE
    called_from = None if caller is None else site_of(caller)
    return CallSite(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, called_from)


def _has_user_frame(frame: FrameType | None) -> bool:
    return any(is_user_file(outer.f_code.co_filename) for outer in _outward(frame))
