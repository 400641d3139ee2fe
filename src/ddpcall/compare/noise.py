"""Noise: how far two sketches of the same thing may lie apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddpcall.compare.steps import Step

MULTIPLE = 6.0
"""See `docs/decisions.md`: of the steps that are the same none came to more than half of it."""

_ORDER_MATTERS = 20.0
_RANDOM = 20.0


@dataclass(frozen=True)
class Noise:
    """The same step in one process, taken again in ways that must not matter.

    Attributes:
        perturbed: From numbers that differ by one unit in the last place.
        permuted: With the samples in another order.
        repeated: Exactly as it was.
        reseeded: From another random state.
    """

    perturbed: Sequence[Step]
    permuted: Sequence[Step]
    repeated: Step
    reseeded: Step

    def measure_tolerance(
        self, reference: Step, sketches: Mapping[str, np.ndarray], kind: str
    ) -> dict[str, float]:
        """Return by parameter how far two sketches may lie apart."""
        eps, total = reference.eps, norm(sketches)
        num_all = sum(reference.numel[name] for name in sketches)
        allowed = {}
        for name, rows in sketches.items():
            seen = [np.linalg.norm(getattr(step, kind)[name][0] - rows[0]) for step in self.counted(reference)]
            # Gradients that cancel to nothing are rounding alone: compare them with the whole.
            share = total * math.sqrt(reference.numel[name] / num_all)
            stored = reference.rounding[name] if kind == "update" else 0.0
            allowed[name] = MULTIPLE * max(*seen, eps * float(np.linalg.norm(rows[0])), eps * share, stored, 1e-37)
        return allowed

    def counted(self, reference: Step) -> list[Step]:
        """Return the steps that tell how large the noise is."""
        return [*self.perturbed, *([] if self.order_matters(reference) else self.permuted)]

    def order_matters(self, reference: Step) -> bool:
        """Say whether the order of the samples changes more than rounding does: then it is no noise."""
        return _distance(self.permuted, reference) > _ORDER_MATTERS * self._floor(reference)

    def is_random(self, reference: Step) -> bool:
        """Say whether another random state changes more than rounding does."""
        return _distance([self.reseeded], reference) > _RANDOM * self._floor(reference)

    def is_unsteady(self, reference: Step) -> bool:
        """Say whether the same step comes out otherwise when it is taken again: then nothing here is noise."""
        return _distance([self.repeated], reference) > _RANDOM * reference.eps * norm(reference.used)

    def _floor(self, reference: Step) -> float:
        return max(_distance(self.perturbed, reference), reference.eps * norm(reference.used))


def _distance(steps: Sequence[Step], reference: Step) -> float:
    return max(
        norm({name: step.used[name] - reference.used[name] for name in reference.names if name in step.used})
        for step in steps
    )


def norm(sketches: Mapping[str, np.ndarray]) -> float:
    """Return the length of all sketches together."""
    return math.sqrt(sum(float((rows[0] ** 2).sum()) for rows in sketches.values()))


@dataclass(frozen=True)
class AssumedNoise:
    """Noise that nobody could measure: a part of the size of what is compared.

    Attributes:
        part: Of its own size, or of its share of all.
        again: The reference once more, where there is one: what it changes is noise.
    """

    part: float
    again: Step | None = None

    def measure_tolerance(
        self, reference: Step, sketches: Mapping[str, np.ndarray], kind: str
    ) -> dict[str, float]:
        """Return by parameter how far two sketches may lie apart."""
        total, num_all = norm(sketches), sum(reference.numel[name] for name in sketches)
        allowed = {}
        for name, rows in sketches.items():
            share = total * math.sqrt(reference.numel[name] / num_all)
            stored = MULTIPLE * reference.rounding[name] if kind == "update" else 0.0
            allowed[name] = max(self.part * max(float(np.linalg.norm(rows[0])), share), stored, 1e-37)
            if self.again is not None and name in (seen := getattr(self.again, kind)):
                allowed[name] = max(allowed[name], MULTIPLE * float(np.linalg.norm(seen[name][0] - rows[0])))
        return allowed

    def counted(self, reference: Step) -> list[Step]:
        """Return the steps that tell how large the noise is."""
        return [] if self.again is None else [self.again]

    def order_matters(self, reference: Step) -> bool:
        """Nobody tried."""
        return False

    def is_random(self, reference: Step) -> bool:
        """Nobody tried."""
        return False

    def is_unsteady(self, reference: Step) -> bool:
        """Nobody tried."""
        return False
