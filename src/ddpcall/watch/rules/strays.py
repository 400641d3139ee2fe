"""Parameters outside every wrapped model that are trained beside one: a loss's, a predictor's, a learned token."""

from __future__ import annotations

import json
import math
import os
import weakref
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store
from torch.optim import Optimizer

from ddpcall.replicas import digest_tensor
from ddpcall.taps import NOWHERE, CallSite, find_call_site
from ddpcall.watch.compare.drift import SKETCH_SIZE, sketch_tensor
from ddpcall.watch.compare.exchange import find_store
from ddpcall.watch.rules.rule import Rule, make_finding
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.steps import Step

MAX_OPTIMIZERS = 8
WAIT_S = 5.0
PATIENCE_STEPS = 8
# Gradients of one batch differ by rounding: by 1e-7 to 1e-5 in float32, by 1e-3 in bfloat16. Those of two batches
# differ by 1e-1 and more.
ROUNDING = 1e-2
# A gradient that is zero but for rounding has any direction.
NEGLIGIBLE = 1e-5

LOOKS = (0, 1, 3, 7, 15)
"""Steps before which strays are looked at: a warmup may begin at a rate of zero."""

_Sketches = list[list[float]]


@dataclass
class _Record:
    """One optimizer's strays on this rank.

    Attributes:
        name: The same on every rank: optimizers with strays are numbered as they first step.
        parameters: The strays.
        site: Where they were handed to the optimizer.
        step: The optimizer's first step.
        reductions: Backwards that reducers had reduced when the optimizer last stepped.
        num_steps: Steps so far.
        offered: Looks that all ranks are to be heard of.
    """

    name: str
    parameters: list[weakref.ref[Tensor]] = field(default_factory=list)
    site: CallSite = NOWHERE
    step: int = 0
    reductions: int = -1  # so that an optimizer may step before the first of them
    num_steps: int = 0
    offered: list[int] = field(default_factory=list)
    is_over: bool = False


class StrayWatch(Rule):
    """Tells strays that should be replicas from a rank's own: they start equal, and drift apart.

    Every rank leaves a digest of them and a sketch of their gradients on the store before the optimizer's first
    step, and before a few later ones. Each is compared with the first to come, and counted. Nobody waits.
    Gradients that are the same on all ranks up to rounding, as those of a gathered batch are, do no harm.

    Blind to: strays that differ from the start (not seeded alike, or meant to); equal gradients that are used
    differently; optimizers that step more than once for one backward of a wrapped model, as inner loops do; all
    but the first 8 optimizers; a second watch in the same processes.
    """

    def __init__(self, run: Run) -> None:
        """Take the run."""
        self._run = run
        self._records: weakref.WeakKeyDictionary[Optimizer, _Record] = weakref.WeakKeyDictionary()
        self._store: Store | None = None
        self._num_ranks = 0

    def judge(self, step: Step) -> None:
        """Look at an optimizer's parameters outside every wrapped model, before it steps."""
        if not (step.view.strays and self._run.models.ledgers and dist.is_initialized()):
            return
        strays = [p for key in step.view.strays if (p := step.get(key)) is not None and p.grad is not None]
        if not strays:
            return
        reductions = sum(state.num_reductions for state in self._run.models.ledgers)
        optimizer = step.optimizer
        record = self._records.get(optimizer)
        if record is None:
            if len(self._records) >= MAX_OPTIMIZERS:
                return
            name, site = str(len(self._records)), self._run.sites.made(optimizer)
            record = self._records[optimizer] = _Record(name, site=site, step=step.number)
            record.parameters = [weakref.ref(stray) for stray in strays]
        if record.is_over:
            return
        record.is_over = reductions <= record.reductions
        record.reductions = reductions
        if not record.is_over:
            self._count(record)

    def _count(self, record: _Record) -> None:
        if record.num_steps in LOOKS:
            self._offer(record, record.num_steps)
        record.is_over = self._judge(record) or record.num_steps > LOOKS[-1] + PATIENCE_STEPS
        record.num_steps += 1

    def close(self, in_order: bool) -> None:
        """Judge what was seen twice; others may be late, and are not waited for."""
        for record in list(self._records.values()):
            if not record.is_over:
                self._judge(record)
        self._records.clear()

    def _offer(self, record: _Record, look: int) -> None:
        parameters = [parameter for reference in record.parameters if (parameter := reference()) is not None]
        digests = list(map(digest_tensor, parameters))
        nothing = [0.0] * SKETCH_SIZE
        gradients = [
            nothing if p.grad is None else sketch_tensor(p.grad, str(i)) for i, p in enumerate(parameters)
        ]
        store, key = self._connect(), f"{record.name}/{look}"
        first_digests, first_gradients = json.loads(store.compare_set(key, "", json.dumps([digests, gradients])))
        if _differ(first_gradients, gradients):
            store.add(f"{record.name}/local", 1)
        record.offered.append(look)
        store.add(f"{key}/{'same' if first_digests == digests else 'apart'}", 1)

    def _judge(self, record: _Record) -> bool:
        """Report these strays if they are replicas that drift; say whether that is decided."""
        for look in list(record.offered):
            store, key = self._connect(), f"{record.name}/{look}"
            num_same, num_apart = (store.add(f"{key}/{kind}", 0) for kind in ("same", "apart"))
            if num_same + num_apart < self._num_ranks:
                return False
            record.offered.remove(look)
            if look == 0 and num_apart:
                return True
            if num_apart and store.add(f"{record.name}/local", 0):
                site = record.site if record.site != NOWHERE else find_call_site()
                count = len(record.parameters)
                message = (
                    f"{count} parameter{'s' * (count != 1)} handed to the optimizer here, trained beside a "
                    f"wrapped model, belong to none: the same on all ranks before its step {record.step} and "
                    "different after it."
                )
                self._run.book.report(make_finding("DC102", "outside", site, message, step=record.step))
                return True
        return False

    def _connect(self) -> Store:
        if self._store is None:
            self._num_ranks = dist.get_world_size()  # the group may be gone when this is judged
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


def _differ(first: _Sketches, second: _Sketches) -> bool:
    """Say whether any gradient differs by more than rounding, as the sketches tell."""
    norms = [max(math.hypot(*one), math.hypot(*other)) for one, other in zip(first, second, strict=False)]
    least = NEGLIGIBLE * math.hypot(*norms)
    distances = [math.dist(one, other) for one, other in zip(first, second, strict=False)]
    return any(
        distance > ROUNDING * norm and distance > least for distance, norm in zip(distances, norms, strict=True)
    )
