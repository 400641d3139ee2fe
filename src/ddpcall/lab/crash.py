"""What a crash leaves behind: the Python stack of a rank that a fatal signal ended, in a file of its own."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
from collections.abc import Generator
from pathlib import Path

FOLDER = "stacks"
_MOST_CHARACTERS = 20_000


@contextlib.contextmanager
def keep_stack_of_crash(run_directory: Path, rank: int) -> Generator[None]:
    """Write the stacks of all threads to `stacks/rank<r>.txt` if SIGSEGV, SIGABRT, SIGBUS, SIGFPE or SIGILL comes.

    The file is opened now: nothing can be opened in a process that crashes. It is removed again where it stayed
    empty. Where the directory cannot be written, stacks go to stderr.

    Blind to: SIGKILL, which no process sees.
    """
    was_enabled = faulthandler.is_enabled()
    path = _stack_file(run_directory, rank)
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w"))
        except OSError:
            faulthandler.enable(all_threads=True)
        else:
            faulthandler.enable(file, all_threads=True)
        try:
            yield
        finally:
            faulthandler.disable()
            if was_enabled:
                faulthandler.enable(sys.stderr)
            remove_empty(run_directory, rank)


def remove_empty(run_directory: Path, *ranks: int) -> None:
    """Take away the files of ranks that did not crash, and the folder with the last one."""
    for path in (_stack_file(run_directory, rank) for rank in ranks):
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()
            path.parent.rmdir()


def read_stack_of_crash(run_directory: Path, rank: int) -> str:
    """Return what a crash left; empty if the rank did not crash, or crashed on a machine with other files."""
    try:
        with _stack_file(run_directory, rank).open(errors="replace") as file:
            return file.read(_MOST_CHARACTERS)
    except OSError:
        return ""


def _stack_file(run_directory: Path, rank: int) -> Path:
    return run_directory / FOLDER / f"rank{rank}.txt"
