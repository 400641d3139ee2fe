"""How many steps each optimizer has done, and which of them leads."""

from __future__ import annotations

import weakref

from torch.optim import Optimizer


class StepCount:
    """Steps by optimizer; the first that stepped a wrapped model's parameters leads: its steps number the run's.

    Attributes:
        most: Steps of the optimizer that did the most, also when it is gone.
        latest: The optimizer that began the last step.
        evaluation_due: Whether the leading optimizer has stepped since the model was last seen evaluated.
    """

    def __init__(self) -> None:
        self._done: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._lead: weakref.ref[Optimizer] | None = None
        self.latest: weakref.ref[Optimizer] | None = None
        self.most = 0
        self._most_living = 0
        self.evaluation_due = False

    def begin(self, optimizer: Optimizer) -> None:
        """Count a step that begins."""
        self._done[optimizer] = self.of(optimizer) + 1
        self.latest = weakref.ref(optimizer)
        self._most_living = max(self._done.values())
        self.most = max(self.most, self._most_living)

    def expect_evaluation(self) -> None:
        """Note a step of the leading optimizer: the model may be evaluated now."""
        self.evaluation_due = True

    def evaluated(self) -> None:
        """Note that it was."""
        self.evaluation_due = False

    def of(self, optimizer: Optimizer) -> int:
        """Return an optimizer's steps, one that has begun included."""
        return self._done.get(optimizer, 0)

    def preparing(self) -> int:
        """Return the number of the step that is being prepared, from 1."""
        return self._most_living + 1

    def leads(self, optimizer: Optimizer) -> bool:
        """Say whether an optimizer leads; the first one asked about does."""
        lead = None if self._lead is None else self._lead()
        if lead is None:
            self._lead = weakref.ref(optimizer)
        return lead is None or lead is optimizer

    def lead_done(self) -> int | None:
        """Return the leading optimizer's steps, None where none leads yet."""
        lead = None if self._lead is None else self._lead()
        return None if lead is None else self.of(lead)

    def preparing_lead(self) -> int:
        """Return the number of the leading optimizer's next step."""
        return (self.lead_done() or 0) + 1
