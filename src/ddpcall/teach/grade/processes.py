"""Run a command that may do anything, under a time limit, and leave no process of it behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

KEPT_OUTPUT_BYTES = 32_768
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_REAP_SECONDS = 10.0


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code; negative for a signal.
        timed_out: Whether it ran into the time limit and was killed.
        seconds: How long it ran.
        output: The last of what it printed, stdout and stderr together.
        left_behind: Processes of it that were still there when it had ended, and were killed.
    """

    code: int
    timed_out: bool
    seconds: float
    output: str
    left_behind: int


def run_limited(command: Sequence[str], directory: Path, environment: dict[str, str], limit_s: float) -> Ended:
    """Run a command to its end or to the limit; then kill whatever it has started, also what was orphaned.

    Args:
        command: The program and its arguments.
        directory: Its working directory.
        environment: Its whole environment.
        limit_s: Seconds it may take.

    Blind to: processes that something outside started on its behalf, such as cron; on systems without
    subreapers (macOS), processes whose parent has ended.
    """
    with adopt_orphans():
        ours = set(psutil.Process().children(recursive=True))
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        kept = [b""]
        reader = threading.Thread(target=_keep_tail, args=(process, kept), daemon=True)
        reader.start()
        timed_out, left_behind = False, 0
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            seconds = time.monotonic() - started
            left_behind = kill_all_but(ours)
        code = process.wait()
        reader.join(_REAP_SECONDS)
        return Ended(code, timed_out, seconds, kept[0].decode(errors="replace"), 0 if timed_out else left_behind)


def _keep_tail(process: subprocess.Popen[bytes], kept: list[bytes]) -> None:
    """Read a process's output to its end and keep the last of it: endless output fills no memory and no pipe."""
    assert process.stdout is not None
    with process.stdout as stream:
        while chunk := os.read(stream.fileno(), 65_536):
            kept[0] = (kept[0] + chunk)[-KEPT_OUTPUT_BYTES:]


def kill_all_but(ours: set[psutil.Process]) -> int:
    """Kill every descendant of this process but those that were there before; return how many there were.

    A process that forks while it is being killed leaves a child for the next round.
    """
    killed: set[psutil.Process] = set()
    deadline = time.monotonic() + _REAP_SECONDS
    while time.monotonic() < deadline:
        others = set(psutil.Process().children(recursive=True)) - ours
        if not others:
            break
        for process in others:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        killed |= others
        psutil.wait_procs(others, timeout=0.1)  # collects those that are our children by now
    return len(killed)


@contextlib.contextmanager
def adopt_orphans() -> Generator[None]:
    """Make this process the parent of every descendant whose own parent ends, so that none gets away.

    Source: prctl(2), PR_SET_CHILD_SUBREAPER. Does nothing where the system has none.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        yield
        return
    before = ctypes.c_int(0)
    prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)
