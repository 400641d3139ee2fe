"""How far replicas are apart, and whether rounding alone can have done it. Pure, but for the measuring."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpcall.replicas import is_unreadable
from ddpcall.sketch import sketch

ROUNDINGS = 32
"""Roundings a step that arithmetic may leave behind where the ranks do the same in another order."""
SKETCH_SIZE = 8
"""Numbers that stand for a tensor: the square of a distance is right on average, half of it off now and then."""
SHARE = 0.05
"""Of the distance that a parameter was trained: beyond it, ranks are apart by what they were trained with."""


@dataclass(frozen=True)
class Drift:
    """How far one parameter's replicas are apart.

    Attributes:
        distance: Between the first rank and the one that is furthest from it, as sketches tell.
        norm: Of the parameter.
        moved: How far training has taken it since the first comparison, as sketches tell.
        epsilon: Of its dtype: 2**-23 for float32.
    """

    distance: float
    norm: float
    moved: float
    epsilon: float

    def is_small(self, step: int) -> bool:
        """Say whether rounding in every step may have added up to this: errors of either sign, so by the root."""
        return self.distance <= ROUNDINGS * self.epsilon * math.sqrt(step) * self.norm

    def is_rounding(self, step: int) -> bool:
        """Say whether it is small, and small beside what training did: a tiny rate makes any difference small."""
        return self.is_small(step) and self.distance <= SHARE * self.moved


def sketch_tensor(tensor: Tensor, name: str) -> list[float]:
    """Return a short linear sketch of a tensor, zeros where its values are not to be read here."""
    if is_unreadable(tensor):
        return [0.0] * SKETCH_SIZE
    values = tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.float()
    return sketch(values, name).view(SKETCH_SIZE, -1).sum(1).tolist()


def measure(tensor: Tensor, name: str, origin: list[float] | None) -> str:
    """Return what other ranks need for a `Drift`, as text.

    Args:
        tensor: The parameter as it is now.
        name: Its name.
        origin: Its sketch as it was first compared; None for one that was not there.
    """
    sums = sketch_tensor(tensor, name)
    epsilon = torch.finfo(tensor.dtype).eps if tensor.dtype.is_floating_point else 0.0
    numbers = (epsilon, math.hypot(*sums), math.dist(sums, origin or sums), *sums)
    return " ".join(map(repr, numbers))


def read_drift(measured: Mapping[int, str]) -> Drift:
    """Return how far the ranks that measured are apart; none measured anything different: nowhere."""
    if not measured:
        return Drift(0.0, 0.0, 0.0, 0.0)
    rows = [[float(number) for number in text.split()] for text in measured.values()]
    distances = [math.dist(rows[0][3:], row[3:]) for row in rows]
    distance = math.inf if any(map(math.isnan, distances)) else max(distances)
    return Drift(distance, max(row[1] for row in rows), max(row[2] for row in rows), rows[0][0])


def largest(drifts: Iterable[Drift]) -> float:
    """Return the largest difference relative to a parameter's norm."""
    return max((drift.distance / drift.norm if drift.norm else math.inf for drift in drifts), default=0.0)
