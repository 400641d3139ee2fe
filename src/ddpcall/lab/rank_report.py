"""What one rank has to say after a trial."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from torch import Tensor

from ddpcall.evidence import (
    CollectiveEvidence,
    CompiledEvidence,
    Failure,
    GradientEvidence,
    HookCount,
    ModesEvidence,
    ReducerEvidence,
    ReplicaEvidence,
    StepTimeline,
)
from ddpcall.mixing import RankSketches


@dataclass
class RankReport:
    """What one rank has to say after a trial; picklable. Parts that were not reached stay None.

    Attributes:
        failure: What this rank raised.
        losses: Loss of each finished step.
        step_ms: Wall-clock time of each finished step, milliseconds, without the tests between the steps.
        accuracies: After each finished step: share of the test set that this rank's model classified correctly;
            None where it was not tested.
        distances: After each step: L2 distance of this rank's trainable parameters from rank 0's, relative to
            the norm of the latter; None where it cannot be told. Empty where the trial did not run to its end.
        timeline: What happened when in one step.
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
    distances: list[float | None] = field(default_factory=list)
    timeline: StepTimeline | None = None
    hooks: tuple[HookCount, ...] | None = None
    reducer: ReducerEvidence | None = None
    collectives: CollectiveEvidence | None = None
    gradients: GradientEvidence | None = None
    mixing: tuple[RankSketches, ...] = ()
    replicas: ReplicaEvidence | None = None
    compiled: CompiledEvidence | None = None
    modes: ModesEvidence | None = None
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
