"""What a graded run is judged by, and what can be read from it: steps side by side, parameters, epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpcall.teach.processes import Ended
from ddpcall.teach.testimony import Testimony, unpack

if TYPE_CHECKING:
    from ddpcall.teach.reference import Reference  # imports torch, which the command line does without
TOLERANCE = 1e-4  # relative; reductions round, and a gradient that is not the mean is far from it
COVERAGE = 0.95
RANKS_OF_THE_PLAN = 2  # the numbers of steps in the catalogue are for two ranks


@dataclass(frozen=True)
class Case:
    """Everything observed of one graded run.

    Attributes:
        reference: The exercise as it was handed out.
        ranks: How many ranks were started.
        min_steps: Optimizer steps that every rank has to make.
        min_accuracy: Test accuracy that every rank's model has to reach.
        ended: How the launch ended.
        testimonies: What the ranks told; fewer than `ranks` where some never spoke.
        findings: What the watch found; None where its file could not be read.
        faults: What the script's text does that no solution needs.
    """

    reference: Reference
    ranks: int
    min_steps: int
    min_accuracy: float
    ended: Ended
    testimonies: list[Testimony]
    findings: list[dict[str, Any]] | None
    faults: list[str] = field(default_factory=list)

    def scale(self, steps: int) -> int:
        """Return a number of steps planned for two ranks as one for this many."""
        return steps * RANKS_OF_THE_PLAN // self.ranks


class NotSeen(Exception):
    """What a criterion needs was never told by a rank."""


@dataclass(frozen=True)
class Judgement:
    """Whether a criterion is met, and what was measured, in a sentence."""

    passed: bool
    sentence: str


@dataclass(frozen=True)
class Criterion:
    """One thing that is judged.

    Attributes:
        key: Its name in the gradebook.
        title: What it asks for, in a few words.
        points: What it is worth.
        judge: From a case to a judgement.
        requires: Keys of criteria without which it is worth nothing.
    """

    key: str
    title: str
    points: int
    judge: Callable[[Case], Judgement]
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """One criterion, judged.

    Attributes:
        criterion: The criterion.
        judgement: How it was judged.
        withheld_by: Titles of the criteria that keep its points back although it is met.
    """

    criterion: Criterion
    judgement: Judgement
    withheld_by: tuple[str, ...]

    @property
    def points(self) -> int:
        """What it earned."""
        return self.criterion.points if self.judgement.passed and not self.withheld_by else 0


def align(case: Case) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """Yield (parameter, number of the step from 0, its record on each rank), as far as all ranks went."""
    if len(case.testimonies) < case.ranks:
        return
    series = [series_by_name(case, testimony) for testimony in case.testimonies]
    for name in series[0]:
        columns = [one.get(name, []) for one in series]
        for records in zip(*columns, strict=False):
            yield name, records[0]["number"], list(records)


def align_all(case: Case) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """Return what `align` yields.

    Raises:
        NotSeen: It is nothing.
    """
    aligned = list(align(case))
    if not aligned:
        raise NotSeen("No optimizer step was seen on all ranks.")
    return aligned


def series_by_name(case: Case, testimony: Testimony) -> dict[str, list[dict[str, Any]]]:
    """Return a rank's records of each parameter, in order of steps; names as in the exercise's Net.

    Each record gets the `number` of its step, from 0. Where every parameter has an optimizer of its own, a step is
    done when one of them comes round again.
    """
    prefix = find_prefix(case, testimony) or ""
    series: dict[str, list[dict[str, Any]]] = {}
    number, stepped = 0, set()
    for step in testimony.steps:
        names = {record["name"] for record in step["parameters"]}
        if stepped & names:
            number, stepped = number + 1, set()
        stepped |= names
        for record in step["parameters"]:
            series.setdefault(record["name"].removeprefix(prefix), []).append({**record, "number": number})
    return series


def steps_that_move(case: Case, testimony: Testimony, part: str) -> tuple[int, int]:
    """Return (steps of the rest of the model before a part first moves, steps in which the part moves)."""
    prefix = f"{find_prefix(case, testimony) or ''}{part}."
    before = moved = 0
    for step in testimony.steps:
        of_part = [record for record in step["parameters"] if record["name"].startswith(prefix)]
        moves = any(record["before"] != record["after"] for record in of_part)
        moved += moves
        before += not moved and not moves
    return before, moved


def find_prefix(case: Case, testimony: Testimony) -> str | None:
    """Return where in the wrapped module the exercise's Net stands, as a prefix of names; None if nowhere."""
    for wrap in reversed(testimony.wraps):
        for name, text in wrap["modules"]:
            if text == case.reference.model_text:
                return f"{name}." if name else ""
    return None


def read_state(case: Case, testimony: Testimony, fact: dict[str, Any] | None) -> dict[str, np.ndarray]:
    """Return the Net's parameters and buffers from a `begin` or `end` fact.

    Raises:
        NotSeen: They are not in it.
    """
    prefix = find_prefix(case, testimony)
    when = "before the first step" if fact is testimony.begin else "at the end"
    absence = NotSeen(f"Of rank {testimony.rank}'s model in DDP nothing was seen {when}.")
    if fact is None or prefix is None:
        raise absence
    names = case.reference.state_names
    for packed in reversed(fact["state"]):
        if all(f"{prefix}{name}" in packed for name in names):
            return {name: unpack(packed[f"{prefix}{name}"]) for name in names}
    raise absence


def trained_forwards(testimony: Testimony) -> list[dict[str, Any]]:
    return [forward for forward in testimony.forwards if forward["gradients"]]


def list_epochs(case: Case) -> list[list[list[str]]]:
    """Return the samples trained on, by epoch and rank; an epoch ends when each rank has had its share."""
    share = len(case.reference.training_rows) // case.ranks
    by_rank = [
        [row for forward in trained_forwards(testimony) for row in forward["rows"]]
        for testimony in case.testimonies
    ]
    count = min((len(rows) // share for rows in by_rank), default=0)
    return [[rows[epoch * share : (epoch + 1) * share] for rows in by_rank] for epoch in range(count)]


def used_the_mean(ranks: list[dict[str, Any]]) -> bool:
    """Say whether each rank used the mean of all ranks' gradients, or the mean made shorter, as clipping does."""
    if any(record["local"] is None or record["used"] is None for record in ranks):
        return False
    mean = np.mean([record["local"] for record in ranks], axis=0)
    allowed = TOLERANCE * max(np.linalg.norm(record["local"]) for record in ranks) + 1e-9
    for record in ranks:
        used = np.asarray(record["used"])
        length = float(mean @ mean)
        factor = min(max(float(used @ mean) / length, 0.0), 1.0) if length else 1.0
        if np.linalg.norm(used - factor * mean) > allowed or (factor == 0.0 and length > allowed**2):
            return False
    return True


def is_close(first: list[float] | None, second: list[float] | None) -> bool:
    if first is None or second is None:
        return False
    a, b = np.asarray(first), np.asarray(second)
    return bool(np.linalg.norm(a - b) <= TOLERANCE * (np.linalg.norm(a) + np.linalg.norm(b)))


def count_nonzero(records: list[dict[str, Any]]) -> int:
    return sum(record["local"] is not None and any(record["local"]) for record in records)


def name_some(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    shown = ", ".join(f"`{name}`" for name in unique[:2])
    return shown + (f" and {len(unique) - 2} more" if len(unique) > 2 else "")
