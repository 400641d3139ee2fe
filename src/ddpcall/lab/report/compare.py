"""Several runs side by side: the cells whose verdicts differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ddpcall.lab.records import RunRecord
from ddpcall.lab.report.truth import VerdictCell, judge_cell, judge_comparison
from ddpcall.lab.report.words import label_cell, plural, varying_axes
from ddpcall.lab.runs import differing_overrides
from ddpcall.verdicts import VERDICTS


@dataclass(frozen=True)
class Difference:
    """One verdict of one cell that is not the same in all runs that have it.

    Attributes:
        label: The cell's name.
        title: The verdict's.
        cells: By run; None where the run has no such cell.
    """

    label: str
    title: str
    cells: tuple[VerdictCell | None, ...]


@dataclass(frozen=True)
class Comparison:
    """What tells runs apart.

    Attributes:
        runs: The runs' short names.
        sentence: How many verdicts differ.
        differences: Verdicts that differ.
        alone: By run: names of the cells that not all runs have.
    """

    runs: tuple[str, ...]
    sentence: str
    differences: tuple[Difference, ...]
    alone: tuple[tuple[str, ...], ...]


def compare_runs(runs: Sequence[RunRecord], names: Sequence[str]) -> Comparison:
    """Compare the verdicts of the cells that at least two runs have, and their comparisons with one process."""
    by_cell = [{trial.cell: trial for trial in run.trials} for run in runs]
    cells = list(dict.fromkeys(cell for trials in by_cell for cell in trials))
    axes = varying_axes(cells) if cells else []
    shared = [cell for cell in cells if sum(cell in trials for trials in by_cell) > 1]
    differences = []
    for cell in shared:
        found = [trials.get(cell) for trials in by_cell]
        for name, spec in VERDICTS.items():
            words = [judge_cell(trial, name) if trial is not None else None for trial in found]
            if len({word.word for word in words if word is not None}) > 1:
                differences.append(Difference(label_cell(cell, axes), spec.title, tuple(words)))
    by_label = [{one.label: judge_comparison(one) for one in run.comparisons} for run in runs]
    labels = [label for label in dict.fromkeys(chain(*by_label)) if sum(label in own for own in by_label) > 1]
    for label in labels:
        words = tuple(own.get(label) for own in by_label)
        if len({word.word for word in words if word is not None}) > 1:
            differences.append(Difference(label, "as one process", words))
    return Comparison(
        tuple(names),
        _sentence(differences, [*shared, *labels]),
        tuple(differences),
        tuple(
            (*_alone(trials, by_cell, lambda cell: label_cell(cell, axes)), *_alone(own, by_label, str))
            for trials, own in zip(by_cell, by_label, strict=True)
        ),
    )


def _alone(
    own: Mapping[Any, object], of_all: Sequence[Mapping[Any, object]], name: Callable[[Any], str]
) -> list[str]:
    return [name(key) for key in own if not all(key in other for other in of_all)]


def _sentence(differences: Sequence[Difference], shared: Sequence[object]) -> str:
    if not shared:
        return "The runs have no cell in common, so that there is nothing to compare."
    cells = len({difference.label for difference in differences})
    if not differences:
        return f"No verdict differs in the {plural(len(shared), 'cell')} that the runs have in common."
    verb = "differs" if len(differences) == 1 else "differ"
    return (
        f"{plural(len(differences), 'verdict')} in {cells} of the {plural(len(shared), 'cell')} "
        f"that the runs have in common {verb}."
    )


def name_runs(runs: Sequence[RunRecord]) -> list[str]:
    """Name each run by what tells it from the others: experiment, torch, device, ranks; else overrides, folder."""
    known = [
        (
            run.experiment,
            f"torch {run.environment.torch}" if run.environment else "torch unknown",
            run.environment.device if run.environment else "",
            plural(run.environment.world_size, "rank") if run.environment else "",
        )
        for run in runs
    ]
    telling = [i for i in range(len(known[0])) if len({facts[i] for facts in known}) > 1] if known else []
    names = [", ".join(facts[i] for i in telling if facts[i]) for facts in known]
    if not telling:
        names = differing_overrides([run.overrides or () for run in runs])
    if len(set(names)) < len(names) or not all(names):
        names = [
            f"{name}, {run.path.name}" if name else run.path.name for name, run in zip(names, runs, strict=True)
        ]
    return [f"{name} ({chr(ord('A') + i)})" if names.count(name) > 1 else name for i, name in enumerate(names)]
