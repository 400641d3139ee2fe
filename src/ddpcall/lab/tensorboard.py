"""Curves for TensorBoard: one run for each cell, one tag for each rank."""

from __future__ import annotations

from pathlib import Path

from ddpcall.evidence import Evidence
from ddpcall.lab.trial import RankReport


def write_events(directory: Path, evidence: Evidence, reports: list[RankReport]) -> None:
    """Write the losses of every rank and the cross-rank gradient difference, by step.

    Args:
        directory: TensorBoard's log directory; the cell gets a folder of its own below it.
        evidence: The trial's evidence.
        reports: The ranks' reports.
    """
    from torch.utils.tensorboard.writer import SummaryWriter

    cell = evidence.cell
    name = "-".join([cell.model.rsplit(".", 1)[-1], cell.wrapper, cell.path, cell.window, cell.hooks])
    with SummaryWriter(str(directory / name)) as writer:
        for rank, report in enumerate(reports):
            for step, loss in enumerate(report.losses):
                writer.add_scalar(f"loss/rank{rank}", loss, step)
            if report.test_accuracy is not None:
                writer.add_scalar(f"test_accuracy/rank{rank}", report.test_accuracy, len(report.losses))
        if evidence.gradients is not None:
            for step, difference in enumerate(evidence.gradients.max_difference):
                writer.add_scalar("gradients/max_difference", difference, step)
