"""What a script does by hand where no reducer averages: gradients that it reduces, or weights that it averages."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from ddpcall.findings import Finding
from ddpcall.watch.findings_book import Status
from ddpcall.watch.rules.averaging import AveragingWatch
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.rules.suspects import Suspects
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.collectives import Mark
from ddpcall.watch.sensors.steps import Step


class ByHand(Rule):
    """Excuses gradients that no reducer averaged: at once where the script sent them, later where it averages.

    Attributes:
        suspects: Gradients that are confirmed as harm where the ranks' parameters differ all the same.
        averaging: Withdraws what was reported, where the script averages the parameters.
    """

    def __init__(self, run: Run, is_compared: Callable[[int], bool]) -> None:
        """Take the run, and whether ranks are compared after a step."""
        self._run = run
        self._is_compared = is_compared
        self.suspects = Suspects(run.book)
        self.averaging = AveragingWatch(run.collectives, run.book)

    def excuses(
        self,
        harm: Hashable,
        explain: Callable[[], Finding],
        step: Step,
        keys: list[int],
        since: Mark | None = None,
    ) -> bool:
        """Say whether gradients that no reducer averaged are no harm, as far as this rank can tell.

        Args:
            harm: What the finding is known under.
            explain: Returns the finding.
            step: The one that uses them.
            keys: Their parameters, by id.
            since: Only what the script sent after this counts.
        """
        if self._run.collectives.covers(step.gradients(keys), since):
            self.suspect(harm, explain, step, keys)
            return True
        if self._run.book.status(harm) is Status.WITHDRAWN:
            return True
        self.averaging.doubt(harm, step.number, [p for key in keys if (p := step.get(key)) is not None])
        return False

    def before_step(self, step: Step) -> None:
        """See whether the parameters were averaged since the last step."""
        self.averaging.look()

    def after_step(self, step: Step) -> None:
        """Note the parameters that a script may average now."""
        if step.states:
            self.averaging.stepped()

    def close(self, in_order: bool) -> None:
        """See whether they were averaged after the last step."""
        self.averaging.look()

    def suspect(self, harm: Hashable, explain: Callable[[], Finding], step: Step, keys: list[int]) -> None:
        """Suspect gradients that may be the same on all ranks, if ranks are compared after this step."""
        if self._is_compared(step.number):
            self.suspects.add(harm, explain(), step.gradients(keys))
