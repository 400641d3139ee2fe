"""Curves for TensorBoard: one run for each cell, one tag for each rank."""

from __future__ import annotations

import shutil
from pathlib import Path

from ddpcall.evidence import Evidence
from ddpcall.lab.loggers import list_scalars, name_cell
from ddpcall.lab.rank_report import RankReport


def write_events(directory: Path, evidence: Evidence, reports: list[RankReport]) -> None:
    """Write by step: every rank's loss, accuracy, distance to rank 0 and modes, and how far gradients lay apart.

    Args:
        directory: TensorBoard's log directory; the cell gets a folder of its own below it.
        evidence: The trial's evidence.
        reports: The ranks' reports.
    """
    from torch.utils.tensorboard.writer import SummaryWriter

    folder = directory / name_cell(evidence.cell)
    shutil.rmtree(folder, ignore_errors=True)  # left by an attempt that was cut before the trial stood
    with SummaryWriter(str(folder)) as writer:
        for tag, value, step in list_scalars(evidence, reports):
            writer.add_scalar(tag, value, step)
