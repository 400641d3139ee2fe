"""The truth table: rows of verdicts with their tones, and for several wrappers an overview of wrappers × paths.

Terminal, documents, Markdown, page and lessons all show this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ddpcall.lab.records import ComparisonRecord, TrialRecord
from ddpcall.lab.report.facts import Section, collect_sections
from ddpcall.lab.report.words import axis_value, label_cell, spell_path, varying_axes
from ddpcall.paths import SPELLING
from ddpcall.verdicts import VERDICTS, find_tone, list_columns


@dataclass(frozen=True)
class VerdictCell:
    """One verdict of one trial.

    Attributes:
        name: The verdict's name.
        word: The verdict.
        tone: good, part, lost, crash, other or none: its color.
        expected: What the experiment expects instead; empty where the verdict is as expected.
    """

    name: str
    word: str
    tone: str
    expected: str


@dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
        number: Its place among the run's trials.
        coordinates: Its values on the table's axes.
        spelling: How the script calls the model.
        cells: One a column.
        evidence: What opens behind them.
    """

    number: int
    coordinates: tuple[str, ...]
    spelling: str
    cells: tuple[VerdictCell, ...]
    evidence: tuple[Section, ...]

    @property
    def label(self) -> str:
        """Name the row as one text."""
        return " × ".join(self.coordinates)


@dataclass(frozen=True)
class OverviewCell:
    """One trial in the overview: its row's number, its gradients, and its three hook verdicts, wrapped first."""

    number: int
    gradients: VerdictCell
    hooks: tuple[VerdictCell, ...]


@dataclass(frozen=True)
class Overview:
    """Wrappers × paths; a place without a trial is None."""

    wrappers: tuple[str, ...]
    paths: tuple[str, ...]
    cells: tuple[tuple[OverviewCell | None, ...], ...]


@dataclass(frozen=True)
class TruthTable:
    """All trials of a run.

    Attributes:
        axes: Wrapper and path, and which other axes vary: the titles of the rows' coordinates.
        columns: Name and title of each verdict shown.
        rows: One a trial, in the order they ran.
        overview: For grids of wrappers and paths alone; else None.
    """

    axes: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    overview: Overview | None


def build_table(
    trials: Sequence[TrialRecord], names: Sequence[str] | None = None, axes: Sequence[str] = ()
) -> TruthTable:
    """Return the truth table of a run's trials.

    Args:
        trials: In the order they ran.
        names: The verdicts to show; None: those that have anything to say.
        axes: The rows' coordinates; empty: wrapper, path, and what else varies.
    """
    varying = varying_axes([trial.cell for trial in trials])
    axes = axes or ["wrapper", "path", *(axis for axis in varying if axis not in ("wrapper", "path"))]
    names = list_columns([trial.verdicts for trial in trials]) if names is None else names
    rows = tuple(_row(number, trial, axes, names) for number, trial in enumerate(trials))
    columns = tuple((name, VERDICTS[name].title) for name in names)
    return TruthTable(tuple(axes), columns, rows, _overview(trials, varying))


def _row(number: int, trial: TrialRecord, axes: Sequence[str], names: Sequence[str]) -> Row:
    return Row(
        number=number,
        coordinates=tuple(axis_value(trial.cell, axis) for axis in axes),
        spelling=spell_path(trial.cell.path),
        cells=tuple(judge_cell(trial, name) for name in names),
        evidence=collect_sections(trial, names),
    )


def judge_cell(trial: TrialRecord, name: str) -> VerdictCell:
    """Return one verdict of a trial with its tone, and what was expected instead."""
    word = trial.word(name)
    return VerdictCell(name, word, find_tone(name, word), trial.unmet.get(name, {}).get("expected", ""))


def judge_comparison(record: ComparisonRecord) -> VerdictCell:
    """Return what a comparison with one process found, and what was expected instead."""
    tone = find_tone("one_process", record.found)
    return VerdictCell("one_process", record.found, tone, "" if record.is_met else record.expected)


def _overview(trials: Sequence[TrialRecord], axes: Sequence[str]) -> Overview | None:
    if axes != ["wrapper", "path"]:
        return None
    wrappers = tuple(dict.fromkeys(trial.cell.wrapper for trial in trials))
    order = [str(path) for path in SPELLING]
    paths = tuple(sorted({t.cell.path for t in trials}, key=lambda p: (order.index(p) if p in order else 99, p)))
    found = {
        (trial.cell.wrapper, trial.cell.path): OverviewCell(
            number,
            judge_cell(trial, "gradients"),
            tuple(judge_cell(trial, name) for name in ("hooks_wrapped", "hooks_inner", "hooks_submodules")),
        )
        for number, trial in enumerate(trials)
    }
    cells = tuple(tuple(found.get((wrapper, path)) for path in paths) for wrapper in wrappers)
    return Overview(wrappers, paths, cells)


@dataclass(frozen=True)
class FailedExpectation:
    """A trial that is not as expected.

    Attributes:
        number: Its row.
        label: Its name.
        spelling: How the script calls the model.
        unmet: Title, expected and measured word of each verdict concerned.
        error: What it raised, if it crashed.
        cause: The true cause, where known.
    """

    number: int
    label: str
    spelling: str
    unmet: tuple[tuple[str, str, str], ...]
    error: str | None
    cause: str | None


def collect_failures(trials: Sequence[TrialRecord]) -> tuple[FailedExpectation, ...]:
    """Return the trials with unmet expectations."""
    axes = varying_axes([trial.cell for trial in trials])
    return tuple(
        FailedExpectation(
            number,
            label_cell(trial.cell, axes),
            spell_path(trial.cell.path),
            tuple(
                (
                    VERDICTS[name].title if name in VERDICTS else name,
                    words.get("expected", ""),
                    words.get("measured", ""),
                )
                for name, words in trial.unmet.items()
            ),
            trial.error,
            trial.cause,
        )
        for number, trial in enumerate(trials)
        if trial.unmet
    )
