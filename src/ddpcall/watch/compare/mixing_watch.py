"""Brings the measured steps of all ranks together, and has them judged on rank 0."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist
from torch.optim import Optimizer

from ddpcall.mixing.record import RankSketches
from ddpcall.taps import NOWHERE, find_call_site
from ddpcall.watch.compare.exchange import find_store
from ddpcall.watch.compare.records import MAX_RANKS, RecordExchange
from ddpcall.watch.rules.mixing import Certificate, MixingRule, Where
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.rules.targets import TargetsRule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.losses import LossSensor

WAIT_S = 15.0


class MixingWatch(Rule):
    """Hands this rank's records to the exchange; on rank 0 they meet those of the others.

    Args:
        run: What this rank knows; its book gets findings, on rank 0.
        losses: Sees the means that losses take for a measured step.

    Attributes:
        trouble: Why no step is measured; empty where nothing went wrong.
    """

    def __init__(self, run: Run, losses: LossSensor) -> None:
        self._run = run
        self._losses = losses
        self._targets = TargetsRule(run.book.report, lambda place: losses.sites.get(place, NOWHERE))
        self._rule = MixingRule(run)
        self._exchange: RecordExchange | None = None
        self._steps: dict[int, Where] = {}
        self._world_size = 0
        self.trouble = ""

    @property
    def certificate(self) -> Certificate:
        """What was measured so far; empty on ranks other than 0."""
        return self._rule.certificate

    def measured(self, number: int, optimizer: Optimizer, record: RankSketches) -> None:
        """Take what was measured of a step.

        Args:
            number: The step's number over all optimizers, by which ranks are paired.
            optimizer: The one that stepped.
            record: This rank's.
        """
        record = replace(record, targets=self._losses.take())
        exchange = self._connect()
        if exchange is None:
            return
        if dist.get_rank() == 0:
            site, made = find_call_site(), self._run.sites.made(optimizer)
            self._steps[number] = Where(self._run.steps.of(optimizer), id(optimizer), site, made)
        exchange.post(number, record.to_bytes)
        self.read()

    def _connect(self) -> RecordExchange | None:
        if self._exchange is None and not self.trouble:
            world_size = self._world_size = dist.get_world_size()
            store = find_store(WAIT_S)
            if store is None:
                self.trouble = "there is no store that all ranks share"
            elif world_size > MAX_RANKS:
                self.trouble = f"more than {MAX_RANKS} ranks"
            else:
                self._exchange = RecordExchange(store, dist.get_rank(), world_size, WAIT_S)
        return self._exchange

    def read(self) -> None:
        """Judge the steps whose records have come together."""
        if self._exchange is not None:
            self._judge(self._exchange)

    def _judge(self, exchange: RecordExchange) -> None:
        self.trouble = exchange.failure
        for number, records in exchange.take():
            where = self._steps.pop(number)
            read = [RankSketches.from_bytes(data) for data in records.values()]
            mixing = self._rule.judge(where, read)
            if mixing is not None and len(read) == self._world_size:
                self._targets.judge(where.step, read, mixing)

    def finish(self, in_order: bool) -> None:
        """Judge what the other ranks measured last, unless the script failed.

        Args:
            in_order: Whether the script came to its end; other ranks are not waited for where it did not.
        """
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        exchange.finish(waits=in_order)
        self._judge(exchange)

    def close(self, in_order: bool) -> None:
        """Say what has waited: for the weights to be averaged, or for more steps."""
        self._rule.close()
        self._targets.close()
