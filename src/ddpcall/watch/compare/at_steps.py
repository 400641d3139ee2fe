"""Has gradients measured in the steps of all optimizers, and replicas compared around those of the leading one."""

from __future__ import annotations

import torch.distributed as dist

from ddpcall.watch.compare.mixing_watch import MixingWatch
from ddpcall.watch.compare.replica_watch import ReplicaWatch
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.gradients import GradientSensor
from ddpcall.watch.sensors.steps import Step


class MeasureAtSteps(Rule):
    """Tells `GradientSensor` of the steps it measures."""

    def __init__(self, gradients: GradientSensor, mixing: MixingWatch) -> None:
        """Take what measures, and what brings the ranks' measures together."""
        self._gradients = gradients
        self._mixing = mixing

    def before_step(self, step: Step) -> None:
        """Take optimizers that were made before the watch began."""
        self._gradients.add(step.optimizer)

    def after_step(self, step: Step) -> None:
        """Count the step, unless it was another optimizer's."""
        if not step.is_nested:
            self._gradients.count()
        # Before replicas are compared: where the gradients tell why they differ, nothing else is said of it.
        self._mixing.read()

    def close(self, in_order: bool) -> None:
        """Judge what the other ranks measured last; `MixingWatch` closes later, when more is explained."""
        self._mixing.finish(in_order)


class CompareAtSteps(Rule):
    """Tells `ReplicaWatch` of the steps it takes vitals around."""

    def __init__(self, run: Run, replicas: ReplicaWatch) -> None:
        """Take the run, and what compares."""
        self._run = run
        self._replicas = replicas

    def before_step(self, step: Step) -> None:
        """Note what the leading optimizer's step starts from."""
        if self._run.steps.lead_done() is not None and self._run.steps.leads(step.optimizer):
            self._replicas.starting(step.number, self._run.collectives.num_sent())

    def after_step(self, step: Step) -> None:
        """Take vitals of the leading optimizer's steps."""
        # A step inside another optimizer's is not one: ZeroRedundancyOptimizer sends parameters after it.
        if step.states and not step.is_nested and self._run.steps.leads(step.optimizer) and dist.is_initialized():
            self._run.steps.expect_evaluation()
            self._replicas.stepped(step.optimizer, step.number)

    def close(self, in_order: bool) -> None:
        """Compare once more."""
        self._replicas.close(in_order)
