"""Curves for TensorBoard: one run for each cell, one tag for each rank."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpcall.evidence import Evidence
from ddpcall.lab.rank_report import RankReport


def write_events(directory: Path, evidence: Evidence, reports: list[RankReport]) -> None:
    """Write by step: every rank's loss, accuracy, distance to rank 0 and modes, and how far gradients lay apart.

    Args:
        directory: TensorBoard's log directory; the cell gets a folder of its own below it.
        evidence: The trial's evidence.
        reports: The ranks' reports.
    """
    from torch.utils.tensorboard.writer import SummaryWriter

    cell = evidence.cell
    name = "-".join([cell.model.rsplit(".", 1)[-1], cell.wrapper, cell.path, cell.window, cell.hooks, cell.mode])
    shutil.rmtree(directory / name, ignore_errors=True)  # left by an attempt that was cut before the trial stood
    with SummaryWriter(str(directory / name)) as writer:
        for rank, report in enumerate(reports):
            for step, loss in enumerate(report.losses):
                writer.add_scalar(f"loss/rank{rank}", loss, step)
            _write_by_step(writer, f"test_accuracy/rank{rank}", report.accuracies)
            _write_by_step(writer, f"distance_to_rank0/rank{rank}", report.distances)
            _write_modes(writer, rank, report)
            if report.test_accuracy is not None and not any(report.accuracies):
                writer.add_scalar(f"test_accuracy/rank{rank}", report.test_accuracy, len(report.losses))
        if evidence.gradients is not None:
            for step, difference in enumerate(evidence.gradients.max_difference):
                writer.add_scalar("gradients/max_difference", difference, step)


def _write_by_step(writer: Any, tag: str, values: Sequence[float | None]) -> None:
    for step, value in enumerate(values):
        if value is not None:
            writer.add_scalar(tag, value, step)


def _write_modes(writer: Any, rank: int, report: RankReport) -> None:
    if report.modes is None:
        return
    for name in ("dropout_kept", "statistics_difference", "batches_tracked"):
        _write_by_step(writer, f"modes/{name}/rank{rank}", getattr(report.modes, name))
    writer.add_scalar(
        f"modes/training_modules/rank{rank}", report.modes.training_modules[rank], len(report.losses)
    )
