"""How good the trained models are at the end: accuracy of each rank's, and how far apart they lie."""

from __future__ import annotations

from dataclasses import dataclass

from ddpcall.evidence import Cell, Consequence
from ddpcall.lab.records import RunRecord
from ddpcall.lab.report.words import label_cell, label_group, varying_axes


@dataclass(frozen=True)
class FinalModels:
    """Trials that ended exactly alike.

    Attributes:
        name: Short, for all of them.
        labels: Their full names.
        gradients: Their verdict.
        accuracy: Test accuracy of each rank's model; None for regression.
        loss: Test loss of each.
        distance: Distance of each from the synchronized run's parameters; None where no such run was made.
        spread: Distance of the farthest rank from rank 0.
    """

    name: str
    labels: tuple[str, ...]
    gradients: str
    accuracy: tuple[float, ...] | None
    loss: tuple[float, ...]
    distance: tuple[float, ...] | None
    spread: float


def collect_final_models(run: RunRecord) -> tuple[FinalModels, ...]:
    """Group the trials by their consequence, in order of first appearance."""
    groups: dict[tuple[str, Consequence], list[Cell]] = {}
    for trial in run.trials:
        if trial.consequence is not None:
            key = (trial.word("gradients"), trial.consequence)
            groups.setdefault(key, []).append(trial.cell)
    cells = [trial.cell for trial in run.trials]
    axes = varying_axes(cells) if cells else []
    return tuple(
        FinalModels(
            label_group(group, cells),
            tuple(label_cell(cell, axes) for cell in group),
            word,
            end.test_accuracy,
            end.test_loss,
            end.distance,
            end.spread,
        )
        for (word, end), group in groups.items()
    )
