"""The source line that a finding names, and the part of it to mark."""

from __future__ import annotations

import ast
import io
import linecache
import os
import tokenize
from dataclasses import dataclass
from pathlib import Path

from ddpcall.files import read_bytes

MAX_BYTES = 2_000_000
_MAX_COLUMNS = 1_000


@dataclass(frozen=True)
class SourceLine:
    """One line of source.

    Attributes:
        text: The line without its indentation; what a terminal would act on is replaced.
        start: The first column to mark, from 0.
        end: The column after the last one to mark.
    """

    text: str
    start: int
    end: int


def read_source_line(file: str, line: int) -> SourceLine | None:
    """Return a line of a file, or None where it cannot be told.

    The call is marked where exactly one begins on the line, otherwise all of the line's code.

    Blind to: files that are not regular, not text, or larger than 2 MB.
    """
    lines = _read_lines(file)
    if not 1 <= line <= len(lines) or not lines[line - 1].strip():
        return None
    text = lines[line - 1]
    start, end = _find_call(lines, line) or _find_code(text)
    indent = len(text) - len(text.lstrip())
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text.strip())
    return SourceLine(shown[:_MAX_COLUMNS], start - indent, min(end - indent, len(shown), _MAX_COLUMNS))


def _read_lines(file: str) -> list[str]:
    if file in linecache.cache and not os.path.exists(file):  # a notebook's cell
        return [line.rstrip("\n") for line in linecache.getlines(file)]
    try:
        content = read_bytes(Path(os.path.realpath(file)), MAX_BYTES)  # it may be a link
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except (OSError, ValueError, SyntaxError, LookupError):
        return []


def _find_call(lines: list[str], line: int) -> tuple[int, int] | None:
    """Return the columns of the one call that begins on a line; None where there are several, or none."""
    try:
        tree = ast.parse("\n".join(lines))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    here = [node for node in ast.walk(tree) if isinstance(node, ast.stmt | ast.Call) and node.lineno == line]
    # What is written to an attribute or an item is as much to blame as the call that makes the value.
    if any(isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name) for node in here):
        return None
    calls = [node for node in here if isinstance(node, ast.Call)]
    inner = {id(node) for call in calls for node in ast.walk(call) if node is not call}
    outer = [call for call in calls if id(call) not in inner]
    if len(outer) != 1:
        return None
    text, call = lines[line - 1].encode(), outer[0]
    stop = call.end_col_offset if call.end_lineno == line else len(text.rstrip())
    return len(text[: call.col_offset].decode()), len(text[:stop].decode())


def _find_code(text: str) -> tuple[int, int]:
    """Return the columns of a line's code: without indentation and comment."""
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    try:
        for token in tokenize.generate_tokens(io.StringIO(text.lstrip()).readline):
            if token.type == tokenize.COMMENT and token.start[1] > 0:
                end = start + len(text.lstrip()[: token.start[1]].rstrip())
    except (tokenize.TokenError, SyntaxError):  # the statement goes on in the next line
        pass
    return start, end
