"""Tracebacks as they are without the watch, whose functions stand around torch's."""

from __future__ import annotations

import dis
from pathlib import Path
from types import TracebackType

_WATCH = Path(__file__).parents[1]
_OWN_FILES = (f"{_WATCH}/", f"{_WATCH.with_name('taps')}/")
_IMPORTS = "ddpcall.imports"  # its functions bear the file name of Python's import system
_HANDS_OVER = dis.opmap["CALL_FUNCTION_EX"]  # f(*args, **kwargs)
_DISABLERS = ("torch/_compile.py", "torch/_dynamo/external_utils.py")  # they stand around what dynamo leaves alone


def drop_own_frames(error: BaseException) -> None:
    """Take the watch's frames out of an exception's traceback, and of those it was raised from or groups.

    What the watch raised itself keeps them at its end.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        current.__traceback__ = _without_own(current.__traceback__)
        waiting += [current.__cause__, current.__context__, *getattr(current, "exceptions", ())]


def _without_own(trace: TracebackType | None) -> TracebackType | None:
    entries: list[TracebackType] = []
    while trace is not None:
        entries.append(trace)
        trace = trace.tb_next
    kept: TracebackType | None = None
    came_from_elsewhere = is_below_own = False
    for entry in reversed(entries):
        is_own = _is_own(entry)
        came_from_elsewhere = came_from_elsewhere or not is_own or (kept is None and _hands_over(entry))
        if is_own and came_from_elsewhere:
            is_below_own = True
        elif not (is_below_own and entry.tb_frame.f_code.co_filename.endswith(_DISABLERS)):
            is_below_own = False
            entry.tb_next = kept
            kept = entry
    return kept


def _is_own(entry: TracebackType) -> bool:
    frame = entry.tb_frame
    return frame.f_code.co_filename.startswith(_OWN_FILES) or frame.f_globals.get("__name__") == _IMPORTS


def _hands_over(entry: TracebackType) -> bool:
    """Say whether the frame was calling what it stands around: a function written in C leaves no frame below."""
    return entry.tb_frame.f_code.co_code[entry.tb_lasti] == _HANDS_OVER
