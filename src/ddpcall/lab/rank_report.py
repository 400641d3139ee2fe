"""What one rank has to say after a trial."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ddpcall.evidence import Failure


@dataclass
class RankReport:
    """What one rank has to say after a trial; picklable. What was not reached stays None.

    Attributes:
        failure: What this rank raised.
        losses: Loss of each finished step.
        step_ms: Wall-clock time of each finished step, milliseconds, without the tests between the steps.
        accuracies: After each finished step: share of the test set that this rank's model classified correctly;
            None where it was not tested.
        parts: What each probe found on this rank, by its name; one that did not get so far is missing.
        columns: What probes counted by step: name to a value for each step.
        parameters: The trained parameters, flat, float32, on the CPU; only kept on its own rank.
        test_loss: Mean loss of this rank's model on the test set.
        test_accuracy: Share classified correctly; None for regression.
        spread: L2 distance of this rank's parameters from rank 0's, relative to the norm of the latter.
        distance: L2 distance from the synchronized run's parameters, relative to the norm of the latter.
        digest: xxh3_64 of this rank's parameters and buffers at the end, in hex.
        resumed_at: Steps that were finished when it was resumed; None where it was not.
    """

    failure: Failure | None = None
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    accuracies: list[float | None] = field(default_factory=list)
    parts: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Sequence[float | None]] = field(default_factory=dict)
    parameters: Tensor | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    spread: float | None = None
    distance: float | None = None
    digest: str | None = None
    resumed_at: int | None = None


def median_step_ms(report: RankReport) -> float | None:
    """Return the median step time in milliseconds, the first step left out; None before two steps."""
    return statistics.median(report.step_ms[1:]) if len(report.step_ms) > 1 else None
