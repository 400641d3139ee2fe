"""Batch norm's statistics and dropout's masks, rank by rank and step by step, where they were measured."""

from __future__ import annotations

from dataclasses import dataclass

from ddpcall.evidence import Cell
from ddpcall.lab.records import RankSteps, RunRecord
from ddpcall.lab.report.series import MOST_LINES, Plot, plot_columns, plot_ranks
from ddpcall.lab.report.words import label_group


@dataclass(frozen=True)
class MaskStrip:
    """Whether all ranks dropped the same positions, by step.

    Attributes:
        name: The trials it is true of.
        same: One a step: None where nothing was dropped.
        kept: By rank: the share of values that dropout kept, on average; None where it dropped nothing.
    """

    name: str
    same: tuple[bool | None, ...]
    kept: tuple[float | None, ...]


@dataclass(frozen=True)
class Modes:
    """What depends on modes, buffers and random numbers.

    Attributes:
        apart: How far the ranks' running statistics lie apart, by step.
        norms: Norms of each rank's running statistics, by step.
        masks: Strips of dropout masks.
        left_out: Strips beyond these.
    """

    apart: Plot | None
    norms: tuple[Plot, ...]
    masks: tuple[MaskStrip, ...]
    left_out: int


def build_modes(run: RunRecord) -> Modes | None:
    """Return what was measured of modes; None where nothing was."""
    apart = plot_columns(
        run, "statistics_difference", "Largest difference of running statistics between two ranks"
    )
    norms = (
        *plot_ranks(run, "running_mean_norm", "Norm of the running means: "),
        *plot_ranks(run, "running_var_norm", "Norm of the running variances: "),
    )
    strips = _strips(run)
    if apart is None and not norms and not strips:
        return None
    return Modes(apart, norms, strips[:MOST_LINES], max(0, len(strips) - MOST_LINES))


def _strips(run: RunRecord) -> tuple[MaskStrip, ...]:
    groups: dict[tuple[tuple[bool | None, ...], tuple[float | None, ...]], list[Cell]] = {}
    for cell, ranks in run.steps.items():
        first = ranks[min(ranks)].columns.get("masks_identical", ())
        if any(same is not None for same in first):
            same = tuple(None if value is None else value > 0 for value in first)
            kept = tuple(_mean_kept(ranks[rank]) for rank in sorted(ranks))
            groups.setdefault((same, kept), []).append(cell)
    cells = list(run.steps)
    return tuple(MaskStrip(label_group(group, cells), same, kept) for (same, kept), group in groups.items())


def _mean_kept(rank: RankSteps) -> float | None:
    kept = [value for value in rank.columns.get("dropout_kept", ()) if value is not None]
    return sum(kept) / len(kept) if kept and min(kept) < 1 else None
