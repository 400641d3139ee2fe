"""Where the watch's answer goes: streams and files that may be closed, full or not what they seem.

Nothing here raises into a training. What cannot be written is told to the caller, who turns it into the exit code.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TextIO


def say(text: str) -> bool:
    """Print a line to stderr, or to stdout where that cannot be written; return whether either could."""
    return print_anywhere(lambda stream: write_text(stream, text + "\n"))


def print_anywhere(print_to: Callable[[TextIO], None]) -> bool:
    """Print to stderr, or to stdout where that cannot be written; return whether either could.

    Args:
        print_to: Gets a stream; whatever it raises, the next one is tried.
    """
    for stream in (sys.stderr, sys.stdout):
        with contextlib.suppress(Exception):  # closed, full, a pipe that nobody reads, or None
            print_to(stream)
            return True
    return False


def write_text(stream: TextIO, text: str) -> None:
    """Write to a stream and leave nothing in its buffer, which would fail again when the interpreter ends.

    Raises:
        OSError: It cannot be written.
    """
    if stream not in (sys.__stderr__, sys.__stdout__):  # a notebook's, a test's, a script's own
        stream.write(text)
        stream.flush()
        return
    stream.flush()
    rest = text.encode(stream.encoding, "backslashreplace")
    while rest:
        rest = rest[os.write(stream.fileno(), rest) :]


def check_output(path: Path, option: str) -> None:
    """Make sure that a file can be written, before the training begins.

    Raises:
        ValueError: It is something that must not be replaced.
        OSError: It cannot be written.
    """
    if path.is_symlink():
        raise ValueError(f"{option} {path} is a symbolic link, and writing replaces it. Write {path.resolve()}.")
    if path.exists() and not path.is_file():
        mode = path.stat().st_mode
        kind = "directory" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device or socket"
        raise ValueError(f"{option} {path} is a {kind}. Write the name of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
        pass
