"""Curves by step: lines that coincide are drawn once, long ones thinned, all in plain numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ddpcall.evidence import Cell
from ddpcall.lab.records import RankSteps, RunRecord
from ddpcall.lab.report.words import label_cell, label_group, varying_axes

Points = tuple[tuple[int, float], ...]
MOST_LINES = 8
MOST_POINTS = 240
_TICKS = 4
_LARGEST = 1e150  # beyond it differences of floats are no longer finite


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: Short, for all that have exactly this curve.
        labels: Their full names.
        points: (step, value), steps rising.
        rank: The rank it belongs to; None where it is about all of them.
    """

    name: str
    labels: tuple[str, ...]
    points: Points
    rank: int | None = None


@dataclass(frozen=True)
class Plot:
    """Curves on common axes.

    Attributes:
        title: What is shown.
        lines: The curves.
        steps: First and last step.
        ticks: Values at which the vertical axis is labeled, lowest and highest included.
        is_share: Whether values are shares, to be read in percent.
        left_out: How many different curves were left out because there are too many.
    """

    title: str
    lines: tuple[Line, ...]
    steps: tuple[int, int]
    ticks: tuple[float, ...]
    is_share: bool = False
    left_out: int = 0


def plot_columns(
    run: RunRecord,
    name: str,
    title: str,
    reduce: Callable[[Sequence[float]], float] = max,
    is_share: bool = False,
) -> Plot | None:
    """Return one curve a trial: a column of steps.jsonl, reduced over the ranks; None where not measured."""
    groups: dict[Points, list[Cell]] = {}
    for cell, ranks in run.steps.items():
        if points := reduce_ranks(ranks, name, reduce):
            groups.setdefault(points, []).append(cell)
    known = [cell for group in groups.values() for cell in group]
    axes = varying_axes(known) if known else []
    lines = [
        Line(label_group(group, known), tuple(label_cell(cell, axes) for cell in group), points)
        for points, group in groups.items()
    ]
    return make_plot(title, lines, is_share=is_share)


def reduce_ranks(ranks: Mapping[int, RankSteps], name: str, reduce: Callable[[Sequence[float]], float]) -> Points:
    """Return a column by step, reduced over the ranks that have it."""
    by_step: dict[int, list[float]] = {}
    for rank in ranks.values():
        for step, value in read_points(rank, name):
            by_step.setdefault(step, []).append(value)
    return tuple((step, reduce(values)) for step, values in sorted(by_step.items()))


def read_points(rank: RankSteps, name: str) -> Points:
    """Return one rank's column without the steps that have no value, or none that can be drawn."""
    values = rank.columns.get(name, ())
    return tuple(
        (step, value)
        for step, value in zip(rank.steps, values, strict=False)
        if value is not None and abs(value) < _LARGEST
    )


def plot_ranks(run: RunRecord, name: str, title: str = "", is_share: bool = False) -> tuple[Plot, ...]:
    """Return one plot for each way the ranks' curves look, on common axes; trials that look alike share one."""
    groups: dict[tuple[Points, ...], list[Cell]] = {}
    for cell, ranks in run.steps.items():
        curves = tuple(read_points(ranks[rank], name) for rank in sorted(ranks))
        if any(curves):
            groups.setdefault(curves, []).append(cell)
    known = [cell for group in groups.values() for cell in group]
    shown = list(groups.items())[:MOST_LINES]
    ticks = make_ticks(value for curves, _ in shown for points in curves for _, value in points)
    plots = []
    for curves, group in shown:
        lines = [
            Line(f"rank {rank}", (f"rank {rank}",), points, rank) for rank, points in enumerate(curves) if points
        ]
        plot = make_plot(f"{title}{label_group(group, known)}", lines, is_share=is_share, ticks=ticks)
        plots += [plot] if plot is not None else []
    return tuple(plots)


def make_plot(
    title: str, lines: Sequence[Line], *, is_share: bool = False, ticks: tuple[float, ...] | None = None
) -> Plot | None:
    """Return a plot of different curves; of too many, those that end farthest from zero stay, and the nearest."""
    if not lines:
        return None
    by_end = sorted(lines, key=lambda line: -abs(line.points[-1][1]))
    kept = by_end if len(by_end) <= MOST_LINES else [*by_end[: MOST_LINES - 1], by_end[-1]]
    drawn = tuple(dataclasses.replace(line, points=thin(line.points)) for line in lines if line in kept)
    steps = [step for line in drawn for step, _ in line.points]
    ticks = ticks or make_ticks(value for line in drawn for _, value in line.points)
    return Plot(title, drawn, (min(steps), max(steps)), ticks, is_share, len(lines) - len(drawn))


def thin(points: Points) -> Points:
    """Keep at most MOST_POINTS points: of every stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / (MOST_POINTS - 2))
    kept = {points[0], points[-1]}
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept |= {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
    return tuple(sorted(kept))


def make_ticks(values: Iterable[float]) -> tuple[float, ...]:
    """Return round numbers from at or below the smallest value, or zero, to at or above the largest."""
    known = list(values)
    low, high = min([0.0, *known]), max([0.0, *known])
    if high == low:
        return (0.0, 1.0)
    raw = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(raw)) if raw >= 5e-324 * 10 else 5e-323
    step = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= raw), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(number * step, 12) if step > 1e-9 else number * step for number in range(first, last + 1))
