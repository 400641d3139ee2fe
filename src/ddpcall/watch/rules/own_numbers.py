"""What this rank's own numbers say of gradients that no reducer averaged: harm for sure, or only suspected."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from ddpcall.findings import Finding
from ddpcall.replicas import digest_tensor
from ddpcall.watch.findings_book import Status
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.collectives import Mark
from ddpcall.watch.sensors.gradients import GradientSensor
from ddpcall.watch.sensors.steps import Step

PATIENCE_STEPS = 64
"""Steps in which the script may begin to average weights in place of gradients."""


@dataclass
class _Reported:
    first_step: int
    parameters: list[Tensor]
    digests: list[int] = field(default_factory=list)
    mark: Mark = field(default_factory=Mark)


class OwnNumbers(Rule):
    """Decides whether a fact that a sensor saw is reported at once, or waits for the mixing matrix.

    A reducer that was not armed harms nobody where the script reduces by hand. So a finding is reported at once
    only where what the optimizer uses is a multiple of what this rank computed, and the script sent less than that
    meanwhile. Everything else is suspected until all ranks' records tell. What was reported is withdrawn where the
    script averages the weights instead (local SGD): they change between two steps, and as many numbers were sent.

    Blind to: weights that are averaged less often than every 64 steps.
    """

    def __init__(self, run: Run, gradients: GradientSensor, is_judged: Callable[[], bool]) -> None:
        super().__init__(run)
        self._gradients = gradients
        self._is_judged = is_judged
        self._reported: dict[Hashable, _Reported] = {}

    def weigh(
        self, harm: Hashable, finding: Finding, step: Step, keys: list[int], since: Mark | None = None
    ) -> bool:
        """Suspect a finding; say whether this rank alone knows that it is harm.

        Args:
            harm: What the finding is known under.
            finding: Of gradients that no reducer averaged.
            step: The one that uses them.
            keys: Their parameters, by id.
            since: Only what the script sent after this can have reduced them.
        """
        book = self._run.book
        status = book.status(harm)
        if status is Status.WITHDRAWN:
            return False
        parameters = [parameter for key in keys if (parameter := step.get(key)) is not None]
        is_own = True if status is Status.REPORTED else self._gradients.are_own(parameters)
        # A part may be reduced and a part not: only all ranks' records tell. Without them the fact stands.
        is_open = is_own is False and self._is_judged()
        if is_open or self._run.collectives.covers(step.gradients(keys), since):
            book.suspect(harm, finding)
            return False
        if is_own is None and self._gradients.ask():  # the next steps are measured; without one, the end reports
            book.hold(harm, finding)
            return False
        first = self._reported[harm].first_step if harm in self._reported else step.number
        if step.number < first + PATIENCE_STEPS:
            self._reported[harm] = _Reported(first, parameters)
        return True

    def before_backward(self) -> None:
        """Have the coming step measured if a backward begins that no reducer is prepared for."""
        if dist.is_initialized() and any(state.is_unprepared() for state in self._run.models.reducer_states):
            self._gradients.ask()

    def before_step(self, step: Step) -> None:
        """See whether the weights were averaged since the last step."""
        self._look()

    def after_step(self, step: Step) -> None:
        """Note the weights as the step left them."""
        if step.states:
            for reported in self._reported.values():
                reported.digests = list(map(digest_tensor, reported.parameters))
                reported.mark = (
                    self._run.collectives.mark()
                )  # an outer optimizer may step before they are averaged

    def close(self, in_order: bool) -> None:
        """See whether they were averaged after the last step."""
        self._look()

    def _look(self) -> None:
        for harm, reported in list(self._reported.items()):
            if not reported.digests or not self._run.collectives.covers(reported.parameters, reported.mark):
                continue
            now = map(digest_tensor, reported.parameters)
            if all(old != new for old, new in zip(reported.digests, now, strict=True)):
                del self._reported[harm]
                self._run.book.withdraw(harm)
