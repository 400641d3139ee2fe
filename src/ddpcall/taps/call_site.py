"""Name the line of the user's code that is running."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch


@dataclass(frozen=True, order=True)
class CallSite:
    """A line of the user's code.

    Attributes:
        file: Path as Python knows it.
        line: From 1; 0 when unknown.
        function: Name of the function the line stands in; `<module>` at the top level.
    """

    file: str
    line: int
    function: str


NOWHERE = CallSite("", 0, "")
TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = str(Path(__file__).resolve().parents[1]) + os.sep
_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep
_INFRASTRUCTURE = ("/accelerate/", "/lightning/fabric/", "/pytorch_lightning/")


@functools.lru_cache(maxsize=4096)
def is_user_file(file: str) -> bool:
    """Say whether a file is the user's: not torch's, ours, the standard library's or a wrapper library's."""
    if file.startswith((TORCH, _OURS, "<frozen", "<eval_with_key>")):  # the last: code that torch.fx wrote
        return False
    in_packages = "/site-packages/" in file or "/dist-packages/" in file
    if file.startswith(_STANDARD_LIBRARY) and not in_packages:
        return False
    return not (in_packages and any(part in file for part in _INFRASTRUCTURE))


def find_call_site(inside: Callable[[Any], bool] | None = None) -> CallSite:
    """Return the line of the user's code that is running.

    Args:
        inside: Says of an object whether it belongs to the model. With it, the site is where the model was
            entered from: the caller of the outermost frame whose first argument belongs to the model.

    Returns:
        The innermost user frame outside the model; on an autograd worker thread, the main thread's.

    Blind to: frames of static methods and free functions of the model below its outermost method.
    """
    frame: FrameType | None = sys._getframe(1)
    if threading.current_thread() is not threading.main_thread() and not _has_user_frame(frame):
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return find_call_site_among(_outward(frame), inside)


def find_call_site_among(frames: Iterable[FrameType], inside: Callable[[Any], bool] | None = None) -> CallSite:
    """Return the user's line among frames, innermost first; see `find_call_site`."""
    found: CallSite | None = None
    for frame in frames:
        if inside is not None and inside(_bound_object(frame)):
            found = None
        elif found is None and is_user_file(frame.f_code.co_filename):
            found = site_of(frame)
            if inside is None:
                break
    return NOWHERE if found is None else found


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


def site_of(frame: FrameType) -> CallSite:
    """Return the line a frame is at."""
    return CallSite(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def _has_user_frame(frame: FrameType | None) -> bool:
    return any(is_user_file(outer.f_code.co_filename) for outer in _outward(frame))
