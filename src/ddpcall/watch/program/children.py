"""Watch this process, which a watched one started as a rank: with `subprocess`, through a shell, by a launcher.

Blind to: ranks started with an environment of their own, by `python -c`, or with `-I`, `-E` or `-S`; the exit
code of `raise SystemExit(3)`, which no exit handler is told.
"""

from __future__ import annotations

import atexit
import sys
import threading
from typing import Any

from ddpcall.watch.program.inherited import Inherited, hand_on, read_inherited
from ddpcall.watch.program.script import Ending
from ddpcall.watch.session import Session


def begin() -> None:
    """Begin the watch before the interpreter runs the script, if this process is a rank of its own.

    The interpreter runs the script itself, so its exit code, traceback and arguments are not the watch's affair.
    """
    inherited = read_inherited()
    if inherited is not None and inherited.is_of_another_rank():
        _begin(inherited)


def begin_as_rank() -> None:
    """Begin the watch in a process that has just made a process group, unless it is watched already."""
    inherited = read_inherited()
    if inherited is not None and not Session.is_running():
        _begin(inherited)


def _begin(inherited: Inherited) -> None:
    session = inherited.make_session()
    hand_on(session)
    ending = Ending.for_child(session)
    ending.await_torch()
    status = _note_status()

    def end() -> None:
        error = getattr(sys, "last_value", None)  # of the exception that ended the script
        if error is not None:
            session.explain_crash(error)
        if ending.is_ours() and not ending.is_finished:
            ending.finish(status[-1] if error is None else 1)

    # Before the exit handlers, as where `ddpcall watch` runs the script: they may end the process group.
    getattr(threading, "_register_atexit", atexit.register)(end)


def _note_status() -> list[Any]:
    """Note what `sys.exit` is called with: an exit handler cannot learn the exit code otherwise."""
    noted: list[Any] = [0]
    leave = sys.exit

    def exit(status: Any = None, /) -> None:
        noted.append(status)
        leave(status)

    sys.exit = exit
    return noted
