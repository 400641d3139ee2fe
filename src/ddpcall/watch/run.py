"""What this rank knows while it is watched: the one argument of sensors and rules."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from ddpcall.taps import Undo, outside_dynamo
from ddpcall.watch.findings_book import FindingsBook
from ddpcall.watch.models import Models
from ddpcall.watch.output.streams import say
from ddpcall.watch.output.text import WatchError
from ddpcall.watch.sensors.collectives import CollectiveLog
from ddpcall.watch.sensors.last_sites import LastSites
from ddpcall.watch.step_count import StepCount


class Run:
    """One watched run on this rank. Sensors write facts in it, rules read them and report into its book.

    Attributes:
        book: The findings.
        models: What is wrapped, and which reducer owns which parameter.
        steps: How many steps each optimizer has done.
        collectives: What the script itself sends.
        sites: The lines that last did what makes replicas differ.
        faults: Errors of the watch's own, a line each.
        contain: Does work of the watch's own: an error in it is said once and never reaches the script. A finding
            that is raised does.
    """

    def __init__(self, book: FindingsBook) -> None:
        """Start with nothing seen."""
        self.book = book
        self.steps = StepCount()
        self.collectives = CollectiveLog()
        self.models = Models(self.collectives.mark)
        self.sites = LastSites(self.models.is_watched, self.may_use_buffers)
        self.faults: list[str] = []
        self.contain = outside_dynamo(self._contain)
        self._undo = ExitStack()

    def _contain(self, work: Callable[..., Any], *args: Any) -> None:
        try:
            work(*args)
        except WatchError:
            raise
        except Exception as error:
            self.faults.append(f"{type(error).__name__}: {error}".splitlines()[0])
            if len(self.faults) == 1:
                say(f"ddpcall watch: an error of its own, please report it\n{traceback.format_exc()}")

    def keep(self, undo: Undo) -> None:
        """Take an undo, for the end."""
        self._undo.callback(undo)

    def may_use_buffers(self, module: nn.Module) -> int | None:
        """Return the steps done, if this module's buffers may be rank-local now: not broadcast since the last."""
        done = self.steps.lead_done()
        for ledger in self.models.ledgers:
            ddp = ledger.ddp()
            if ddp is None or done is None or module not in (ddp, ddp.module) or not ddp.modules_buffers:
                continue
            # Counters such as num_batches_tracked need no averaging.
            buffers = [buffer for buffer in ddp.modules_buffers if buffer.is_floating_point()]
            if not ledger.forwarded and buffers and not self.collectives.covers(buffers):
                return done
        return None

    def detach(self) -> None:
        """Take everything off that was kept, the last first."""
        self.models.close()
        self._undo.close()
