"""What a graded run is judged by, and what can be read from it: steps side by side, parameters, epochs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpcall.teach.grade.observations import RankObservations
from ddpcall.teach.grade.processes import Ended
from ddpcall.teach.question import NotSeen

if TYPE_CHECKING:
    from ddpcall.teach.grade.reference import Reference  # imports torch, which the command line does without
TOLERANCE = 1e-4  # relative; reductions round, and a gradient that is not the mean is far from it
RANKS_OF_THE_PLAN = 2  # the numbers of steps in the catalogue are for two ranks


@dataclass(frozen=True)
class Step:
    """One parameter in one optimizer step, on all ranks.

    Attributes:
        name: The parameter, as in the exercise's Net.
        number: The step, from 0. Where every parameter has an optimizer of its own, a step is done when one of
            them comes round again.
        ranks: By rank: `own` and `used` gradient (sketches), `armed`, `unarmed`, `lr`, `before`, `after`.
    """

    name: str
    number: int
    ranks: list[dict[str, Any]]


@dataclass(frozen=True)
class GradedRun:
    """Everything observed of one graded run.

    Attributes:
        reference: The exercise as it was handed out.
        num_ranks: How many ranks were started.
        min_steps: Optimizer steps that every one of two ranks has to make.
        min_accuracy: Test accuracy that every rank's model has to reach.
        ended: How the launch ended.
        observations: What the ranks told; fewer than `num_ranks` where some never started.
        findings: What the watch found; None where its file could not be read.
        faults: What the script's text does that no solution needs.
    """

    reference: Reference
    num_ranks: int
    min_steps: int
    min_accuracy: float
    ended: Ended
    observations: list[RankObservations]
    findings: list[dict[str, Any]] | None
    faults: list[str] = field(default_factory=list)

    def scale(self, steps: int) -> int:
        """Return a number of steps planned for two ranks as one for this many."""
        return steps * RANKS_OF_THE_PLAN // self.num_ranks

    @cached_property
    def steps(self) -> list[Step]:
        """Every parameter in every step that all ranks took.

        Raises:
            NotSeen: There is none.
        """
        series = [self.series(seen) for seen in self.observations]
        if len(series) < self.num_ranks:
            series = [{}]
        found = [
            Step(name, ranks[0]["number"], list(ranks))
            for name in series[0]
            for ranks in zip(*(one.get(name, []) for one in series), strict=False)
        ]
        if not found:
            raise NotSeen("No optimizer step was seen on all ranks.")
        return found

    def series(self, seen: RankObservations) -> dict[str, list[dict[str, Any]]]:
        """Return a rank's records of each parameter, in order of steps, each with the `number` of its step."""
        prefix = self.find_prefix(seen) or ""
        series: dict[str, list[dict[str, Any]]] = {}
        number, stepped = 0, set()
        for step in seen.steps:
            names = {record["name"] for record in step["parameters"]}
            if stepped & names:
                number, stepped = number + 1, set()
            stepped |= names
            for record in step["parameters"]:
                series.setdefault(record["name"].removeprefix(prefix), []).append({**record, "number": number})
        return series

    def count_steps(self, seen: RankObservations) -> int:
        """Return how many steps a rank took."""
        return max((len(records) for records in self.series(seen).values()), default=0)

    def find_prefix(self, seen: RankObservations) -> str | None:
        """Return where in the wrapped module the exercise's Net stands, as a prefix of names; None if nowhere."""
        for wrap in reversed(seen.wraps):
            for name, text in wrap["modules"]:
                if text == self.reference.model_text:
                    return f"{name}." if name else ""
        return None

    def read_state(self, seen: RankObservations, when: str) -> dict[str, np.ndarray]:
        """Return the Net's parameters and buffers at the `begin` or `end` of a rank's training.

        Raises:
            NotSeen: They were not told.
        """
        prefix, fact = self.find_prefix(seen), getattr(seen, when)
        names = self.reference.state_names
        for told in reversed(fact["state"] if fact is not None and prefix is not None else []):
            if all(f"{prefix}{name}" in told for name in names):
                return {name: np.array(told[f"{prefix}{name}"], np.float32) for name in names}
        moment = "before the first step" if when == "begin" else "at the end"
        raise NotSeen(f"Of rank {seen.rank}'s model in DDP nothing was seen {moment}.")

    def epochs(self) -> Iterator[list[list[int]]]:
        """Yield the samples trained on, by epoch and rank; an epoch ends when each rank has had its share."""
        share = len(self.reference.places) // self.num_ranks
        by_rank = [seen.trained_rows() for seen in self.observations]
        for first in range(0, min(map(len, by_rank), default=0) - share + 1, share):
            yield [rows[first : first + share] for rows in by_rank]


def used_the_mean(ranks: list[dict[str, Any]]) -> bool:
    """Say whether each rank used the mean of all ranks' gradients, or the mean made shorter, as clipping does."""
    if any(record["own"] is None or record["used"] is None for record in ranks):
        return False
    own, used = (np.array([record[which] for record in ranks]) for which in ("own", "used"))
    mean = own.mean(axis=0)
    allowed = TOLERANCE * np.linalg.norm(own, axis=1).max() + 1e-9
    square = float(mean @ mean)
    factor = np.clip(used @ mean / square, 0.0, 1.0) if square else np.ones(len(used))
    rest = np.linalg.norm(used - factor[:, None] * mean, axis=1)
    return bool((rest <= allowed).all() and ((factor > 0) | (square <= allowed**2)).all())


def is_close(first: list[float] | None, second: list[float] | None) -> bool:
    """Say whether two gradients are the same up to rounding."""
    if first is None or second is None:
        return False
    a, b = np.array(first), np.array(second)
    return bool(np.linalg.norm(a - b) <= TOLERANCE * (np.linalg.norm(a) + np.linalg.norm(b)))
