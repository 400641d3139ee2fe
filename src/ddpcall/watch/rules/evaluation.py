"""DC403: an evaluation counts the samples twice that a DistributedSampler adds to make shares even."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ddpcall.accelerator import is_capturing
from ddpcall.replicas import is_unreadable
from ddpcall.taps import find_call_site
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.collectives import find_summed
from ddpcall.watch.sensors.loaders import Pass
from ddpcall.watch.sensors.steps import Step

_MOST_SUMMED = 8
"""Numbers that are summed in one tensor beside a count: losses, numbers of correct ones."""
_MOST_PASSES = 8
_LEAST_GIVEN = 8
"""Fewer samples may be any other number."""


class EvaluationRule(Rule):
    """Compares what is summed over all ranks after an evaluation with the number of samples of this rank's share.

    Padding goes to the last ranks, one sample each. Where such a rank sums up as many samples as it was given, it
    counts its padding; all ranks run the same script.

    Blind to: numbers that are gathered, summed batch by batch, or never summed: a mean of means, predictions.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._passes: list[Pass] = []
        self._is_told = False
        run.collectives.listeners.append(lambda name, args: run.contain(self._hear, name, args))

    def taken(self, current: Pass) -> None:
        """Nothing is done: an evaluation is judged when it is over."""

    def ended(self, current: Pass) -> None:
        """Keep an evaluation whose samples are not all this rank's own."""
        share = current.share
        if share is None or current.is_training or current.num_drawn != share.num_given or self._is_told:
            return
        own = len(range(share.rank, share.num_samples, share.num_replicas))
        is_padded = share.num_spare < share.num_replicas and _LEAST_GIVEN <= own < current.num_drawn
        if is_padded and share.num_replicas == _count_ranks() and self._is_evaluating():
            self._passes = [*self._passes[1 - _MOST_PASSES :], current]

    def _is_evaluating(self) -> bool:
        roots = [state.root() for state in self._run.models.reducer_states]
        return not torch.is_grad_enabled() or any(root is not None and not root.training for root in roots)

    def after_step(self, step: Step) -> None:
        """What is summed from here on is about the training."""
        self._passes = []

    def _hear(self, name: str, args: tuple[Any, ...]) -> None:
        if not self._passes or self._is_told or name not in ("allreduce", "reduce"):
            return
        summed = find_summed(args)
        if summed is None or not 0 < summed.numel() <= _MOST_SUMMED or is_unreadable(summed):
            return
        if is_capturing(summed):
            return
        values = summed.flatten().tolist()
        current = next((each for each in self._passes if each.num_drawn in values), None)
        if current is not None:
            self._is_told = True
            self._report(current)

    def _report(self, current: Pass) -> None:
        share = current.share
        assert share is not None
        total = share.num_replicas * current.num_drawn
        message = (
            f"{share.num_samples} samples are evaluated, and counted as {total} here: DistributedSampler gives "
            f"{total - share.num_samples} of them twice so that all shares are of one size, and what is summed "
            "over the ranks has them twice, too."
        )
        step = max(1, self._run.steps.preparing() - 1)
        self.report("DC403", "padding_counted", find_call_site(), message, step=step)


def _count_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


RULES = (EvaluationRule,)
