"""Where rank 0 speaks: a console of the right width, a progress bar, and errors in one message."""

from __future__ import annotations

import io
import os
import sys
import textwrap
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.markup import escape

UNLIMITED = 10_000  # columns: a table then takes what it needs


def say(message: str) -> None:
    """Print one line for people, to stdout; a path that is longer than the terminal is wide stays whole."""
    console = open_console()
    lines = textwrap.wrap(message, console.width, break_long_words=False, break_on_hyphens=False)
    console.print(escape("\n".join(lines)), highlight=False, soft_wrap=True)


def warn(message: str) -> None:
    """Print an error message to stderr."""
    Console(stderr=True, soft_wrap=True).print(f"ddpcall: {escape(message)}", highlight=False)


class _Terminal(Console):
    """A console that may fail: its reader left (`| head`), its disk is full. What was measured stands in files."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print; where that fails say so once, and print nothing from then on."""
        try:
            super().print(*args, **kwargs)
        except OSError as error:
            self.on_broken_pipe()
            warn(f"stdout cannot be written: {error.strerror}. The result is in the run directory")


def open_console() -> Console:
    """Return a console on stdout: as wide as the terminal or COLUMNS say, and without a limit when piped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where it is ASCII
    console = _Terminal()
    return console if console.is_terminal or "COLUMNS" in os.environ else _Terminal(width=UNLIMITED)


def shorten_path(path: Path) -> str:
    """Return a path as one types it here: relative where it lies below the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path)


class Progress:
    """A bar over the trials, on a terminal; nothing when piped or on other ranks."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        console = Console(stderr=True)
        self._bar = rich_progress.Progress(
            rich_progress.SpinnerColumn(),
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, label: str) -> None:
        """Show which trial runs."""
        self._bar.update(self._task, description=escape(label))

    def finish(self) -> None:
        """Count one trial as done."""
        self._bar.advance(self._task)
