"""Who learns from whom: the measured mixing matrices as pictures, one for all trials whose matrices are alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddpcall.evidence import Cell, MixingEvidence
from ddpcall.lab.records import TrialRecord
from ddpcall.lab.report.words import format_number, label_cell, label_group, list_names, varying_axes
from ddpcall.verdicts import NO_DATA_PARALLELISM, find_tone

MOST_RANKS = 16
_MOST_PICTURES = 24
_DIGITS = 3


@dataclass(frozen=True)
class Entry:
    """One number of a matrix.

    Attributes:
        value: How much of the column is in what the row used; None where the step does not tell.
        text: The number as it is written.
        says: The same as a sentence.
        strength: Its size relative to the largest of the matrix, from 0 to 1.
    """

    value: float | None
    text: str
    says: str
    strength: float


@dataclass(frozen=True)
class MixingPicture:
    """One matrix.

    Attributes:
        name: Short, for all trials that have it.
        labels: Their full names.
        word: The verdict.
        tone: Its color.
        explanation: What it means, in sentences.
        facts: What else was measured.
        rows: Names of the rows: ranks, or groups of ranks.
        columns: Names of the columns, likewise.
        blocks: Where backwards are mixed differently, the columns of each stand together: the blocks' names, empty
            for one block alone.
        entries: By row.
    """

    name: str
    labels: tuple[str, ...]
    word: str
    tone: str
    explanation: str
    facts: tuple[tuple[str, str], ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    blocks: tuple[str, ...]
    entries: tuple[tuple[Entry, ...], ...]


@dataclass(frozen=True)
class MixingPictures:
    """The pictures of a run, and how many more there are."""

    pictures: tuple[MixingPicture, ...]
    left_out: int


@dataclass(frozen=True)
class _Matrix:
    """A matrix over ranks or groups of ranks: what is drawn. Equal ones share a picture."""

    rows: tuple[str, ...]
    columns: tuple[tuple[str, int], ...]
    values: tuple[tuple[float | None, ...], ...]


def build_pictures(trials: Sequence[TrialRecord]) -> MixingPictures | None:
    """Return a picture for each different matrix, in order of first appearance; None where none was measured.

    Trials without data parallelism have none: they have no reduction that a matrix could show.
    """
    groups: dict[tuple[str, _Matrix], list[TrialRecord]] = {}
    for trial in trials:
        mixing = trial.evidence.mixing if trial.evidence is not None else None
        word = trial.word("mixing")
        if mixing is not None and word != NO_DATA_PARALLELISM and _can_be_drawn(mixing):
            groups.setdefault((word, _draw(mixing)), []).append(trial)
    if not groups:
        return None
    cells = [trial.cell for trial in trials]
    pictures = [_picture(word, matrix, group, cells) for (word, matrix), group in groups.items()]
    return MixingPictures(tuple(pictures[:_MOST_PICTURES]), max(0, len(pictures) - _MOST_PICTURES))


def _can_be_drawn(mixing: MixingEvidence) -> bool:
    """Say whether there is a number to draw and every rank has a row, and a column for each backward."""
    backwards = dict.fromkeys(column[-1] for column in mixing.columns if column)
    expected = [(rank, backward) for backward in backwards for rank in mixing.ranks]
    return (
        sorted(mixing.columns) == sorted(expected)
        and len(mixing.matrix) == len(set(mixing.ranks)) == len(mixing.ranks)
        and all(len(row) == len(expected) for row in mixing.matrix)
        and any(value is not None for row in mixing.matrix for value in row)
    )


def _draw(mixing: MixingEvidence) -> _Matrix:
    """Round, so that what differs by rounding alone is one picture; put many ranks into groups."""
    sets = _group_ranks(mixing.ranks)
    backwards = list(dict.fromkeys(backward for _, backward in mixing.columns))
    columns = [(members, backward) for backward in backwards for members in sets]
    places = {column: number for number, column in enumerate(mixing.columns)}
    values = tuple(
        tuple(
            _add_up([[mixing.matrix[mixing.ranks.index(i)][places[j, backward]] for j in members] for i in row])
            for members, backward in columns
        )
        for row in sets
    )
    names = tuple((_name_ranks(members), backward) for members, backward in columns)
    return _Matrix(tuple(map(_name_ranks, sets)), names, values)


def _group_ranks(ranks: Sequence[int]) -> list[tuple[int, ...]]:
    size = -(-len(ranks) // MOST_RANKS)
    return [tuple(ranks[start : start + size]) for start in range(0, len(ranks), size)]


def _add_up(block: Sequence[Sequence[float | None]]) -> float | None:
    """Return how much of a group's gradients is in what a rank of the other group uses, on average."""
    known = [[value for value in row if value is not None and math.isfinite(value)] for row in block]
    if not all(known):
        return None
    return round(sum(map(sum, known)) / len(known), _DIGITS) + 0.0


def _name_ranks(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"


def picture_watched(mixing: Mapping[str, Any]) -> MixingPicture | None:
    """Return the picture of a watched run's last measured step; None where it has none that can be drawn.

    Args:
        mixing: `watched.mixing` as it was read from a findings file: the fields of
            `ddpcall.watch.rules.mixing.Certificate`.
    """
    try:
        evidence = MixingEvidence(
            steps=(),
            shapes=tuple(map(str, mixing["shapes"])),
            step=int(mixing["steps"]),
            matrix=tuple(tuple(None if v is None else float(v) for v in row) for row in mixing["matrix"]),
            ranks=tuple(range(int(mixing["ranks"]))),
            columns=tuple((int(rank), int(backward)) for rank, backward in mixing["columns"]),
            scale=float(mixing["scale"]),
            residual=(float(mixing["residual"]),),
            by_parameter={str(shape): tuple(map(str, names)) for shape, names in mixing["by_parameter"].items()},
            reason="",
            explanation="",
        )
        counts = [f"{shape.replace('_', ' ')} in {int(number)}" for shape, number in mixing["shapes"].items()]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    if not _can_be_drawn(evidence):
        return None
    word = str(mixing.get("shape", evidence.shapes[-1]))
    facts = (
        ("steps measured", f"{evidence.step}: {', '.join(counts)}"),
        ("largest left unexplained", format_number(evidence.residual[0] or 0.0)),
        *((shape, list_names(names)) for shape, names in evidence.by_parameter.items()),
    )
    return _fill("the last measured step", (), word, "", facts, _draw(evidence))


def _picture(word: str, matrix: _Matrix, group: Sequence[TrialRecord], cells: Sequence[Cell]) -> MixingPicture:
    axes = varying_axes(cells)
    evidence = group[0].evidence
    assert evidence is not None
    assert evidence.mixing is not None
    return _fill(
        label_group([trial.cell for trial in group], cells),
        tuple(label_cell(trial.cell, axes) for trial in group),
        word,
        evidence.mixing.explanation,
        tuple(list_facts(evidence.mixing)),
        matrix,
    )


def _fill(
    name: str,
    labels: tuple[str, ...],
    word: str,
    explanation: str,
    facts: tuple[tuple[str, str], ...],
    matrix: _Matrix,
) -> MixingPicture:
    largest = max((abs(value) for row in matrix.values for value in row if value is not None), default=0.0)
    backwards = [backward for _, backward in matrix.columns]
    several = len(set(backwards)) > 1
    return MixingPicture(
        name=name,
        labels=labels,
        word=word,
        tone=find_tone("mixing", word),
        explanation=explanation,
        facts=facts,
        rows=matrix.rows,
        columns=tuple(name for name, _ in matrix.columns),
        blocks=tuple(_name_backward(backward) for backward in dict.fromkeys(backwards)) if several else (),
        entries=tuple(
            tuple(
                _entry(row, name, backward if several else None, value, largest)
                for (name, backward), value in zip(matrix.columns, values, strict=True)
            )
            for row, values in zip(matrix.rows, matrix.values, strict=True)
        ),
    )


def _entry(row: str, column: str, backward: int | None, value: float | None, largest: float) -> Entry:
    text = "–" if value is None else f"{value:.2g}"
    user = f"ranks {row} use" if "–" in row else f"rank {row} uses"
    amount = (
        "an amount that the step does not tell" if value is None else "nothing" if value == 0 else f"{value:.3g}"
    )
    if row == column:
        whose = "their own gradients" if "–" in row else "its own gradient"
    else:
        whose = f"the gradients of ranks {column}" if "–" in column else f"rank {column}'s gradient"
    when = f" ({_name_backward(backward)})" if backward is not None else ""
    strength = abs(value) / largest if value is not None and largest else 0.0
    return Entry(value, text, f"{user} {amount} of {whose}{when}", round(strength, 3))


def _name_backward(backward: int) -> str:
    return f"backward {backward}" if backward >= 0 else "the step before"


def list_facts(mixing: MixingEvidence) -> list[tuple[str, str]]:
    """Return what was measured beside the matrix, as labels and values."""
    shapes = ", ".join(dict.fromkeys(mixing.shapes))
    facts = [("steps measured", f"{', '.join(map(str, mixing.steps))}: {shapes}")]
    if mixing.scale is not None:
        facts.append(("times the mean", format_number(mixing.scale)))
    residuals = [value for value in mixing.residual if value is not None]
    if residuals:
        facts.append(("left unexplained", format_number(max(residuals))))
    if len(mixing.by_parameter) > 1:
        facts += [(shape, list_names(names)) for shape, names in mixing.by_parameter.items()]
    return facts
