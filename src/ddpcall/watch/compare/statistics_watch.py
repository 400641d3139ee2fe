"""Compares, at the end of a run, statistics in buffers that nothing sends around. No collective."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store
from torch.optim import Optimizer

from ddpcall.launch_environment import read_attempt
from ddpcall.replicas import digest_tensor
from ddpcall.taps import CallSite, read_site
from ddpcall.watch.compare.drift import largest, measure, read_drift
from ddpcall.watch.compare.exchange import find_store
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.rules.statistics import judge_statistics
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.statistics import StatisticsSensor
from ddpcall.watch.sensors.steps import Step

LOOKED_AT = 2
"""The step of the first optimizer that is looked at."""
STEPS_APART = 3
WAIT_S = 10.0


class StatisticsWatch(Rule):
    """Finds buffers that one training step moves; at the end each rank leaves those on the store, rank 0 compares.

    Args:
        run: What this rank knows.
        find_roots: Returns the models whose parameters optimizers step, wrapped or not.

    Blind to: see `StatisticsSensor`; runs that fail; ranks that end more than 10 s after rank 0.
    """

    _watches = itertools.count()

    def __init__(self, run: Run, find_roots: Callable[[], list[nn.Module]]) -> None:
        super().__init__(run)
        self._find_roots = find_roots
        self._sensor = StatisticsSensor()
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._place = 0, 1
        self._told: list[dict[str, Any]] = []
        self._before: list[Tensor | None] = []
        self._number = next(self._watches)  # a second watch in this process reads nothing of the first

    def before_step(self, step: Step) -> None:
        """Look no further, once the step's forwards and backwards are over."""
        if self._sensor.is_looking and step.number >= LOOKED_AT:
            self._sensor.stop()
            self._run.statistics = self._sensor.statistics

    def after_step(self, step: Step) -> None:
        """Look at the next step of the first optimizer that comes that far; later, note what came of it."""
        if self._optimizer is None and step.number == LOOKED_AT - 1 and dist.is_initialized():
            self._optimizer = weakref.ref(step.optimizer)
            self._place = dist.get_rank(), dist.get_world_size()
            if self._place[1] > 1:
                self._sensor.start(self._find_roots())
        number, leads = step.number, self._optimizer is not None and self._optimizer() is step.optimizer
        if not leads or not self._run.statistics or number <= LOOKED_AT:
            return
        if number & (number - 1) == 0:  # the model may be gone at the end
            told = [self._tell(root, number) for root in self._find_roots() if not self._is_sent(root)]
            self._told = [each for each in told if each["buffers"]]
        elif number & (number + 1) == 0:
            now = [each.current() for each in self._run.statistics]
            self._before = [None if buffer is None else buffer.clone() for buffer in now]

    def close(self, in_order: bool) -> None:
        """Compare what nothing sends around."""
        self._sensor.stop()
        store = find_store() if in_order and self._told else None
        if store is not None:
            self._compare(PrefixStore(f"ddpcall/statistics/{read_attempt()}/{self._number}", store), self._told)

    def _is_sent(self, root: nn.Module) -> bool:
        wrappers = (state.ddp() for state in self._run.models.reducer_states if state.root() is root)
        return any(ddp is not None and ddp.broadcast_buffers for ddp in wrappers)

    def _tell(self, root: nn.Module, step: int) -> dict[str, Any]:
        names = {id(module): f"{name}." if name else "" for name, module in root.named_modules()}
        digests = tuple(digest_tensor(p) for p in root.parameters() if p.requires_grad)
        buffers = {}
        for each, before in zip(self._run.statistics, self._before, strict=True):
            prefix, now = names.get(id(each.module())), each.current()
            if prefix is not None and now is not None and before is not None and before.shape == now.shape:
                name = f"{prefix}{each.attribute}"
                step_size = float((now - before).norm())
                buffers[name] = measure(now, name, None), dataclasses.asdict(each.site), step_size
        return {"step": step, "parameters": hash(digests), "buffers": buffers}

    def _compare(self, store: Store, told: list[dict[str, Any]]) -> None:
        rank, num_ranks = self._place
        store.set(str(rank), json.dumps(told))
        others = [str(other) for other in range(num_ranks) if other != rank]
        deadline = time.monotonic() + WAIT_S
        while rank == 0 and time.monotonic() < deadline:
            if store.check(others):
                return self._judge([told, *(json.loads(store.get(other)) for other in others)])
            time.sleep(0.02)
        return None

    def _judge(self, ranks: list[list[dict[str, Any]]]) -> None:
        if any(finding.code == "DC205" for finding in self._run.book.told()):
            return
        for models in zip(*ranks, strict=False):
            if len({model["step"] for model in models}) > 1:
                continue
            shared = set.intersection(*(set(model["buffers"]) for model in models))
            names = [name for name in models[0]["buffers"] if name in shared]
            differences = {name: _compare_ranks([model["buffers"][name] for model in models]) for name in names}
            sites: dict[str, CallSite] = {name: read_site(models[0]["buffers"][name][1]) for name in names}
            parameters = {rank: model["parameters"] for rank, model in enumerate(models)}
            finding = judge_statistics(LOOKED_AT, models[0]["step"], parameters, differences, sites)
            if finding is not None:
                self._run.report(finding)


def _compare_ranks(told: list[tuple[str, Any, float]]) -> float:
    """Return how far ranks are apart in one buffer, relative to its norm; 0 where a step takes it as far.

    A hidden state or noise is replaced in each step; statistics of other data stay apart.
    """
    drift = read_drift(dict(enumerate(measured for measured, _, _ in told)))
    step_size = max(size for _, _, size in told)
    return largest([drift]) if drift.distance > STEPS_APART * step_size else 0.0
