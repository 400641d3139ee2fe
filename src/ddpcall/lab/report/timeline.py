"""One measured step of each trial, laid out in lanes; what was skipped gets a place to be drawn as absent.

What happened is drawn where it was measured. What did not happen has no time: its place is where it would have
stood, beside the forward or the backward of the same step, and its width says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ddpcall.evidence import Skipped, TimelineEvent
from ddpcall.lab.records import RunRecord, TimelineRecord
from ddpcall.lab.report.words import label_cell, plural, spell_path, varying_axes

MOST_TIMELINES = 240
MOST_IN_FULL = 16
_LANES = ("wrapped", "inner", "below", "backward", "communication", "optimizer")
_GHOST_SHARE = 0.02  # of the whole width, for what would have been short
_SHORT_ENDS = {"pre_hook", "hook"}


@dataclass(frozen=True)
class Span:
    """Something that happened, or, as a ghost, did not.

    Attributes:
        kind: pre_hook, forward, hook, backward, bucket, collective or optimizer.
        name: What.
        start_us: Microseconds from the start of the step.
        end_us: Likewise.
        detail: What else is known.
        absent: Whether it did not happen.
    """

    kind: str
    name: str
    start_us: float
    end_us: float
    detail: str = ""
    absent: bool = False


@dataclass(frozen=True)
class Lane:
    """One line of a timeline: its name, and what lies on it."""

    name: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Timeline:
    """One step of one trial on one rank.

    Attributes:
        number: Place of the trial among the run's trials; -1 where the trial is not known.
        label: The trial's name.
        spelling: How the script calls the model.
        rank: Whose step.
        step: Its number, from 0.
        total_us: When the last event ended.
        lanes: From the wrapped object down to the optimizer; empty ones are left out.
        absent: Names of what was skipped.
        caption: The same in one sentence.
    """

    number: int
    label: str
    spelling: str
    rank: int
    step: int
    total_us: float
    lanes: tuple[Lane, ...]
    absent: tuple[str, ...]
    caption: str


@dataclass(frozen=True)
class Timelines:
    """The measured steps of a run.

    Attributes:
        first: Rank 0's, one a trial.
        others: The other ranks'.
        left_out: How many there are beyond these.
    """

    first: tuple[Timeline, ...]
    others: tuple[Timeline, ...]
    left_out: int


def build_timelines(run: RunRecord) -> Timelines | None:
    """Return the steps to draw: all ranks' of a small grid, rank 0's of a large one; None without any."""
    records = [record for record in run.timeline if record.events]
    if not records:
        return None
    axes = varying_axes([record.cell for record in records])
    numbers = {trial.cell: number for number, trial in enumerate(run.trials)}
    lowest = min(record.rank for record in records)
    is_small = len({record.cell for record in records}) <= MOST_IN_FULL
    first = [record for record in records if record.rank == lowest]
    others = [record for record in records if record.rank != lowest] if is_small else []
    shown = [*first[:MOST_TIMELINES], *others]
    drawn = [
        build_timeline(record, numbers.get(record.cell, -1), label_cell(record.cell, axes), is_small)
        for record in shown
    ]
    return Timelines(
        tuple(timeline for timeline in drawn if timeline.rank == lowest),
        tuple(timeline for timeline in drawn if timeline.rank != lowest),
        len(records) - len(shown),
    )


def build_timeline(record: TimelineRecord, number: int, label: str, in_full: bool = True) -> Timeline:
    """Lay one record out.

    Args:
        record: What was measured.
        number: The trial's place.
        label: The trial's name.
        in_full: False leaves out the hooks of modules below the inner one: a large page could not bear them.
    """
    events = [*record.events, *record.collectives]
    lanes: dict[str, list[Span]] = {name: [] for name in _LANES}
    for event in events:
        if in_full or event.owner != "submodule" or event.kind == "forward":
            span = Span(event.kind, event.name, event.start_us, event.end_us, event.detail or "")
            lanes[_lane_of(event)].append(span)
    total = max(max(event.end_us for event in events), 1.0)
    for skip in _gather(record.skipped):
        lanes[_lane_of(skip)].append(_ghost(skip, events, total))
    return Timeline(
        number,
        label,
        spell_path(record.path),
        record.rank,
        record.step,
        total,
        tuple(Lane(name, tuple(spans)) for name, spans in lanes.items() if spans),
        tuple(_name_absence(skip) for skip in record.skipped),
        _caption(record, total),
    )


def _lane_of(thing: TimelineEvent | Skipped) -> str:
    if thing.kind in ("bucket", "collective"):
        return "communication"
    if thing.kind in ("backward", "optimizer"):
        return thing.kind
    return thing.owner if thing.owner in ("wrapped", "inner") else "below"


def _gather(skipped: Sequence[Skipped]) -> Iterable[Skipped]:
    """Yield what was skipped; of the many modules below, one for each kind of thing."""
    below: dict[str, list[Skipped]] = {}
    for skip in skipped:
        if skip.owner == "submodule":
            below.setdefault(skip.name.split(" of ")[0] if skip.kind in _SHORT_ENDS else skip.kind, []).append(
                skip
            )
        else:
            yield skip
    for kind, group in below.items():
        if len(group) == 1:
            yield group[0]
        else:
            names = ", ".join(skip.name.split(" of ")[-1] for skip in group)
            yield Skipped(
                kind=group[0].kind, name=f"{kind} of {len(group)} modules", owner="submodule", detail=names
            )


def _ghost(skip: Skipped, events: Sequence[TimelineEvent], total: float) -> Span:
    start, end = _place(skip, events, total)
    return Span(skip.kind, skip.name, start, end, skip.detail or "", absent=True)


def _place(skip: Skipped, events: Sequence[TimelineEvent], total: float) -> tuple[float, float]:
    """Return where something absent would have stood: around, before or after what did happen."""
    forward = _extent(events, "forward") or (0.0, total)
    backward = _extent(events, "backward") or (forward[1], total)
    short = _GHOST_SHARE * total
    if skip.kind == "forward":
        return forward
    if skip.kind == "pre_hook":
        return forward[0] - short, forward[0]
    if skip.kind == "hook" and "backward" in skip.name:
        return (backward[0] + backward[1] - short) / 2, (backward[0] + backward[1] + short) / 2
    if skip.kind == "hook":
        return forward[1], forward[1] + short
    if skip.kind in ("bucket", "collective"):
        return (backward[0] + backward[1]) / 2, backward[1]
    return backward[1] + short, backward[1] + 2 * short


def _extent(events: Sequence[TimelineEvent], kind: str) -> tuple[float, float] | None:
    spans = [event for event in events if event.kind == kind]
    return (min(e.start_us for e in spans), max(e.end_us for e in spans)) if spans else None


def _name_absence(skip: Skipped) -> str:
    if skip.kind == "forward":
        return f"forward of {skip.name}"
    return skip.name.replace(" of ", " hook of ", 1) if skip.kind in _SHORT_ENDS else skip.name


def _caption(record: TimelineRecord, total: float) -> str:
    parts = [f"{total / 1000:.2f} ms in all"]
    for kind in ("forward", "backward"):
        extent = _extent(record.events, kind)
        if extent is not None:
            parts.append(f"{kind} {(extent[1] - extent[0]) / 1000:.2f} ms")
    buckets = [event for event in record.events if event.kind == "bucket"]
    sizes = f" ({', '.join(event.detail for event in buckets if event.detail)})" if buckets else ""
    parts.append(f"{plural(len(buckets), 'bucket')} reduced{sizes}" if buckets else "no bucket reduced")
    if record.raised:
        parts.append("the step ended in an exception")
    return ", ".join(parts)
