"""Parameters outside every wrapped model that are trained beside one: a loss's, a predictor's, a learned token."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store
from torch.optim import Optimizer

from ddpcall.replicas import digest_tensor
from ddpcall.taps import NOWHERE, CallSite, find_call_site
from ddpcall.watch.events import Emit, Event, EventKind
from ddpcall.watch.exchange import find_store

MAX_OPTIMIZERS = 8
WAIT_S = 5.0


@dataclass
class _Record:
    """One optimizer's strays on this rank.

    Attributes:
        name: The same on every rank: optimizers with strays are numbered as they first step.
        parameters: The strays.
        site: Where they were handed to the optimizer.
        step: The optimizer's first step.
        reductions: Backwards that reducers had reduced when the optimizer last stepped.
        num_looks: Steps before which the strays were looked at.
    """

    name: str
    parameters: list[weakref.ref[Tensor]] = field(default_factory=list)
    site: CallSite = NOWHERE
    step: int = 0
    reductions: int = 0
    num_looks: int = 0
    is_over: bool = False


class StrayWatch:
    """Tells strays that should be replicas from a rank's own: they start equal, and drift apart.

    Every rank leaves a digest of them on the store before the optimizer's first step and before its second.
    Each is compared with the first to come, and counted. Nobody waits.

    Blind to: strays that differ from the start (not seeded alike, or meant to); optimizers that step more than
    once for one backward of a wrapped model, as inner loops do; all but the first 8 optimizers; a second watch in
    the same processes.
    """

    def __init__(self, emit: Emit) -> None:
        """Take where events go."""
        self._emit = emit
        self._records: weakref.WeakKeyDictionary[Optimizer, _Record] = weakref.WeakKeyDictionary()
        self._store: Store | None = None

    def look(
        self, optimizer: Optimizer, strays: Iterable[Tensor], step: int, reductions: int, site: CallSite
    ) -> None:
        """Look at an optimizer's strays, before it steps.

        Args:
            optimizer: The one that is about to step.
            strays: Its parameters outside every wrapped model.
            step: The number of this step of its.
            reductions: Backwards that reducers have reduced so far.
            site: Where the strays were handed to the optimizer.
        """
        record = self._records.get(optimizer)
        if record is None:
            if len(self._records) >= MAX_OPTIMIZERS:
                return
            record = self._records[optimizer] = _Record(str(len(self._records)), site=site, step=step)
            record.parameters = [weakref.ref(stray) for stray in strays]
        if record.is_over:
            return
        record.is_over = reductions <= record.reductions
        record.reductions = reductions
        if not record.is_over:
            self._count(record)

    def _count(self, record: _Record) -> None:
        if record.num_looks < 2:
            self._offer(record, "start" if record.num_looks == 0 else "later")
            record.num_looks += 1
        elif self._judge(record) is not None:
            record.is_over = True

    def close(self) -> None:
        """Judge what was seen twice; others may be late, and are not waited for."""
        for record in list(self._records.values()):
            if record.num_looks == 2 and not record.is_over:
                self._judge(record)
        self._records.clear()

    def _offer(self, record: _Record, when: str) -> None:
        parameters = [parameter for reference in record.parameters if (parameter := reference()) is not None]
        mine = repr([digest_tensor(parameter) for parameter in parameters])
        store = self._connect()
        first = store.compare_set(f"{record.name}/{when}", "", mine).decode()
        store.add(f"{record.name}/{when}/{'same' if first == mine else 'apart'}", 1)

    def _judge(self, record: _Record) -> bool | None:
        """Emit an event if these strays are replicas that drift; None while not all ranks have been heard."""
        store, name = self._connect(), record.name
        counts = {key: store.add(f"{name}/{key}", 0) for key in ("start/same", "later/same", "later/apart")}
        if counts["later/same"] + counts["later/apart"] < dist.get_world_size():
            return None
        drifted = counts["start/same"] == dist.get_world_size() and counts["later/apart"] > 0
        if drifted:
            site = record.site if record.site != NOWHERE else find_call_site()
            facts = {"count": len(record.parameters)}
            self._emit(Event(EventKind.OUTSIDE, site, record.step, (), (), facts))
        return drifted

    def _connect(self) -> Store:
        if self._store is None:
            store = find_store(WAIT_S)
            if store is None:
                raise RuntimeError("no store that all ranks share")
            own: Any = store
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                own = own.clone()  # the default process group's: its timeout is not ours to set
            own.set_timeout(timedelta(seconds=WAIT_S))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = PrefixStore(f"ddpcall/strays/{attempt}", own)
        return self._store
