"""What this rank knows while it is watched: the one argument of sensors and rules."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn

from ddpcall.findings import Finding
from ddpcall.mixing.places import clean_name
from ddpcall.taps import Undo, outside_dynamo
from ddpcall.watch.findings_book import FindingsBook, is_about_gradients
from ddpcall.watch.models import Models
from ddpcall.watch.output.streams import say
from ddpcall.watch.output.text import WatchError
from ddpcall.watch.sensors.collectives import CollectiveLog
from ddpcall.watch.sensors.last_sites import LastSites
from ddpcall.watch.sensors.statistics import Statistic
from ddpcall.watch.step_count import StepCount

if TYPE_CHECKING:
    from ddpcall.watch.rules.rule import Rule

OF_OTHER = " (of optimizer"
"""Tells parameters of the same name in two models apart."""


class Run:
    """One watched run on this rank. Sensors write facts in it, rules read them and report into its book.

    Attributes:
        book: The findings.
        models: What is wrapped, and which reducer owns which parameter.
        steps: How many steps each optimizer has done.
        collectives: What the script itself sends.
        sites: The lines that last did what makes replicas differ.
        inside: Names of the measured parameters that belong to a wrapped model.
        reduced: Names of those that a reducer owns.
        sharded: Names of those that a wrapper shards.
        statistics: Buffers that training moves, with the line that does.
        written: Digest of the gradients that the script wrote in place of a backward's; 0 where there are none.
        is_compared: Says of a parameter's name whether its weights are compared.
        will_explain: Says whether measured gradients tell why weights differ, and it is not reported yet.
        faults: Errors of the watch's own, a line each.
        rules: Are told of what sensors see, in this order.
        contain: Does work of the watch's own: an error in it is said once and never reaches the script. A finding
            that is raised does.
    """

    def __init__(self, book: FindingsBook) -> None:
        self.book = book
        self.steps = StepCount()
        self.collectives = CollectiveLog()
        self.models = Models(self.collectives.mark)
        self.sites = LastSites(self.models.is_watched, self.may_use_buffers)
        self.inside: set[str] = set()
        self.reduced: set[str] = set()
        self.sharded: set[str] = set()
        self.statistics: list[Statistic] = []
        self.written = 0
        self.is_compared: Callable[[str], bool] = lambda name: False
        self.will_explain: Callable[[], bool] = lambda: False
        self.faults: list[str] = []
        self.rules: Sequence[Rule] = ()
        self.contain = outside_dynamo(self._contain)
        self._undo = ExitStack()

    def _contain(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            work(*args, **kwargs)
        except WatchError:
            raise
        except Exception as error:
            self.faults.append(f"{type(error).__name__}: {error}".splitlines()[0])
            if len(self.faults) == 1:
                say(f"ddpcall watch: an error of its own, please report it\n{traceback.format_exc()}")

    def report(self, finding: Finding) -> None:
        """Report a finding."""
        self.book.report(finding)

    def confirm(self, names: Collection[str]) -> list[Hashable]:
        """Report what was suspected of the gradients of some parameters; return what it was known under."""
        plain = {name.partition(OF_OTHER)[0] for name in names}
        return self.book.confirm_all(lambda finding: not plain.isdisjoint(map(clean_name, finding.parameters)))

    def is_explained(self, name: str) -> bool:
        """Say whether a rank has reported already why the gradients of a parameter are not averaged."""
        name = name.partition(OF_OTHER)[0]
        told = [finding for finding in self.book.told() if is_about_gradients(finding) or finding.code == "DC306"]
        return any(not finding.parameters or name in map(clean_name, finding.parameters) for finding in told)

    def num_sent(self) -> int | None:
        """Return how many numbers the script sent since the last step; None where it never sent any."""
        return self.collectives.num_sent() if self.collectives.num_called else None

    def keep(self, undo: Undo) -> None:
        """Take an undo, for the end."""
        self._undo.callback(undo)

    def may_use_buffers(self, module: nn.Module) -> int | None:
        """Return the steps done, if this module's buffers may be rank-local now: not broadcast since the last."""
        done = self.steps.lead_done()
        for state in self.models.reducer_states:
            ddp = state.ddp()
            if ddp is None or done is None or module not in (ddp, ddp.module) or not ddp.modules_buffers:
                continue
            # Counters such as num_batches_tracked need no averaging.
            buffers = [buffer for buffer in ddp.modules_buffers if buffer.is_floating_point()]
            if not state.forwarded and buffers and not self.collectives.covers(buffers):
                return done
        return None

    def detach(self) -> None:
        """Take everything off that was kept, the last first."""
        self.models.close()
        self._undo.close()
