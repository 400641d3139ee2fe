"""Run a command that may do anything, under a time limit, and leave no process of it behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

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
        ours = set(descendants())
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
        assert process.stdout is not None
        output = _Tail(process.stdout)
        timed_out = False
        left_behind = 0
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            seconds = time.monotonic() - started
            left_behind = kill_all_but(ours, process)
        return Ended(process.wait(), timed_out, seconds, output.read(), 0 if timed_out else left_behind)


class _Tail:
    """Reads a stream to its end and keeps the last of it: output without end costs no memory and blocks nobody."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._kept = b""
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        descriptor = self._stream.fileno()
        while chunk := os.read(descriptor, 65_536):
            self._kept = (self._kept + chunk)[-KEPT_OUTPUT_BYTES:]

    def read(self) -> str:
        """Return what was kept; call it when no writer is left."""
        self._thread.join(_REAP_SECONDS)
        if not self._thread.is_alive():
            self._stream.close()
        return self._kept.decode(errors="replace")


def kill_all_but(ours: set[int], process: subprocess.Popen[bytes]) -> int:
    """Kill every descendant of this process but those that were there before; return how many there were.

    A process that forks while it is being killed leaves a child for the next round.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + _REAP_SECONDS
    while time.monotonic() < deadline:
        process.poll()
        strangers = [pid for pid in descendants() if pid not in ours]
        if not strangers:
            break
        for pid in strangers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= set(strangers)
        _reap(strangers, process.pid)
        time.sleep(0.01)
    return len(killed)


def _reap(pids: Sequence[int], known: int) -> None:
    """Collect adopted children that have ended; `known` is its Popen's to collect."""
    for pid in pids:
        if pid != known:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def descendants() -> list[int]:
    """Return the process ids below this process, zombies included."""
    children: dict[int, list[int]] = {}
    for pid, parent in _processes():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _processes() -> Iterator[tuple[int, int]]:
    """Yield (process id, parent's process id) of every process that can be seen."""
    if not Path("/proc/self/stat").exists():
        listed = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        for line in listed.splitlines():
            pid, parent = line.split()
            yield int(pid), int(parent)
        return
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                # The name, in parentheses, may hold anything.
                yield int(entry), int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])


@contextlib.contextmanager
def adopt_orphans() -> Iterator[None]:
    """Make this process the parent of every descendant whose own parent ends, so that none gets away.

    Source: prctl(2), PR_SET_CHILD_SUBREAPER. Does nothing where the system has none.
    """
    libc = ctypes.CDLL(None)
    prctl = getattr(libc, "prctl", None)
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
