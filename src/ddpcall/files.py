"""Files of others: read within bounds, and nothing but regular files is read or replaced.

Run directories, records and findings come from other people and machines. What reads them follows no link out of
their directory, waits for no FIFO, and reads no more than it is told.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any, BinaryIO

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BIG_NUMBER = re.compile(r"\d{300}")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file that is no link.

    Raises:
        OSError: It cannot be read, or is something else.
    """
    try:
        # Without O_NONBLOCK a FIFO without a writer would be waited for.
        file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.EINVAL, "it is no regular file, but a link", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return file


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file that is no link.

    Raises:
        OSError: It cannot be read, is something else, or is larger than `max_bytes`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > max_bytes else file.read(max_bytes + 1)
    if size > max_bytes or len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes} bytes", str(path))
    return content


def read_text(path: Path, max_bytes: int) -> str:
    """Return the text of a regular file that is no link; what is no UTF-8 is replaced.

    Raises:
        OSError: As for `read_bytes`.
    """
    return read_bytes(path, max_bytes).decode("utf-8", errors="replace")


def parse_json(text: str) -> Any:
    """Return what a JSON text says, with lone surrogates replaced, which no file could be written with.

    Raises:
        ValueError: It is no JSON, nests too deep, or holds a number that no float can.
    """
    if _BIG_NUMBER.search(text):
        raise ValueError("it holds a number of 300 digits or more")
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    return _without_surrogates(found) if "\\u" in text else found


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return [_without_surrogates(item) for item in value] if isinstance(value, list) else value


def is_below(path: Path, roots: tuple[Path, ...]) -> bool:
    """Say whether a file lies in one of some directories, all links followed."""
    try:
        real = path.resolve(strict=True)
        return any(real.is_relative_to(root.resolve(strict=True)) for root in roots)
    except (OSError, RuntimeError, ValueError):
        return False


def replace_text(path: Path, text: str) -> None:
    """Put a text in a file's place at once; a link, a device or a FIFO there is left alone.

    Raises:
        OSError: It cannot be written, or something other than a regular file is there.
    """
    check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "x", encoding="utf-8", errors="replace") as file:  # follows no link
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def check_replaceable(path: Path) -> None:
    """Refuse what is there and no regular file.

    Raises:
        OSError: Something other than a regular file is there.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a link, a device or a FIFO, which is not replaced", str(path))


def append_text(path: Path, text: str) -> None:
    """Append to a regular file, or begin one; a link, a device or a FIFO there is left alone.

    Raises:
        OSError: It cannot be written, or something other than a regular file is there.
    """
    check_replaceable(path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        file.write(text)
