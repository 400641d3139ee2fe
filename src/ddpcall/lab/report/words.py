"""Names, numbers and word lists that every part of the report says alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from ddpcall.evidence import AXES, Cell
from ddpcall.paths import SPELLING

_MOST_NAMES = 5
MOST_RANKS_NAMED = 4
_MOST_LISTED = 6


def varying_axes(cells: Sequence[Cell]) -> list[str]:
    """Return the axes on which the cells differ; `path` where they do not differ at all."""
    return [axis for axis in AXES if len({getattr(cell, axis) for cell in cells}) > 1] or ["path"]


def axis_value(cell: Cell, axis: str) -> str:
    """Return a cell's coordinate as it is shown."""
    value = getattr(cell, axis)
    if axis == "model":
        return value.rsplit(".", 1)[-1]
    return f"{value} hooks" if axis == "hooks" else value


def label_cell(cell: Cell, axes: Sequence[str]) -> str:
    """Return a cell's name by the axes that tell it from the others."""
    return " × ".join(axis_value(cell, axis) for axis in axes)


def values_that_tell(group: Sequence[Cell], cells: Sequence[Cell], most: int) -> list[str]:
    """Return the coordinates that tell a group from the other cells, on as few axes as do; empty where none do.

    Args:
        group: Some of the cells.
        cells: All of them.
        most: How many coordinates may be named.
    """
    axes = varying_axes(cells)
    in_group = set(group)
    others = [cell for cell in cells if cell not in in_group]
    for number in range(1, len(axes) + 1):
        for chosen in itertools.combinations(axes, number):
            inside = list(dict.fromkeys(label_cell(cell, chosen) for cell in group))
            if len(inside) <= most and not {label_cell(cell, chosen) for cell in others} & set(inside):
                return inside
    return []


def label_group(group: Sequence[Cell], cells: Sequence[Cell]) -> str:
    """Return a short name for some of the cells."""
    if len(group) == len(cells) and len(cells) > 1:
        return f"all {len(cells)} cells"
    told = values_that_tell(group, cells, _MOST_NAMES)
    if told:
        return ", ".join(told)
    axes = varying_axes(cells)
    return f"{label_cell(group[0], axes)} and {len(group) - 1} more"


def spell_path(path: str) -> str:
    """Return how a script writes a call path; the path's own name where it is unknown."""
    return {str(key): text for key, text in SPELLING.items()}.get(path, path)


def join_words(words: Sequence[str]) -> str:
    """Return `a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def list_names(names: Sequence[str]) -> str:
    """Return the names, or the first of them and how many more there are."""
    more = len(names) - _MOST_LISTED
    return ", ".join(names[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def plural(number: int, noun: str) -> str:
    """Return the number with its noun."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_number(value: float | None) -> str:
    """Return a measured number with three significant digits; a dash where there is none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3g}"


def format_share(value: float) -> str:
    """Return a share in percent."""
    return f"{value:.1%}" if math.isfinite(value) else str(value)


def list_by_rank(values: Sequence[float | None], write: Callable[[float], str]) -> str:
    """Return a number for each rank; one where all are written alike, and the range where the ranks are many."""
    texts = ["–" if value is None else write(value) for value in values]
    if len(set(texts)) == 1:
        return texts[0]
    if len(texts) <= MOST_RANKS_NAMED:
        return ", ".join(texts)
    numbers = [value for value in values if value is not None]
    return f"{write(min(numbers))} to {write(max(numbers))}"


def code(text: str) -> str:
    """Mark a name as code, as Markdown does; a backtick in it would end the mark."""
    return f"`{text.replace('`', chr(39))}`"
