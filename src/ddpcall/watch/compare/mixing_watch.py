"""Measures the steps of all optimizers, brings the ranks' measures together, and has them judged on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ddpcall.mixing.judge import judge_records
from ddpcall.mixing.record import UNREAD, RankSketches
from ddpcall.mixing.result import Mixing
from ddpcall.mixing.sums import (
    AFTER,
    BEFORE,
    LAYOUT,
    MAX_RANKS,
    USED,
    Pooled,
    certify,
    digest_record,
    judge_some,
    know_nothing,
    pool,
)
from ddpcall.replicas import digest_bytes
from ddpcall.taps import NOWHERE, find_call_site
from ddpcall.watch.compare.exchange import Comparison, RunExchange
from ddpcall.watch.compare.vitals import GRADIENTS, TARGETS, Vitals
from ddpcall.watch.rules.mixing import Certificate, MixingRule, Where
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.rules.targets import TargetsRule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.gradients import GradientSensor
from ddpcall.watch.sensors.losses import LossSensor
from ddpcall.watch.sensors.steps import Step

_MAX_NAMED = 5
SHARING_OPTIMIZER = "ZeroRedundancyOptimizer"
"""By name: to import it takes a while."""


class MixingWatch(Rule):
    """Hands digests and sums of this rank's gradients to the exchange; on rank 0 they meet those of the others.

    The sums of all ranks certify the mean. Where they do not, or digests differ that should not, rank 0 asks for
    the records of whole parameters: of all ranks, or of the `MAX_RANKS` that differ first.

    Args:
        run: What this rank knows; its book gets findings, on rank 0.
        exchange: That of this run.
        every: Steps between vitals, as the user chose; 0 for never: then ranks are not compared.
        find_roots: Returns the inner modules of the wrapped models that are known.

    Attributes:
        gradients: Measures the steps.
        losses: Sees the means that losses take for a measured step.

    Blind to: which mixture it is, with more ranks than can be asked, where all used the same that is not the mean;
    numbers of targets that differ between so many ranks.
    """

    def __init__(
        self, run: Run, exchange: RunExchange, every: int, find_roots: Callable[[], Iterable[nn.Module]]
    ) -> None:
        super().__init__(run)
        self.gradients = GradientSensor(run, every, find_roots, self._measured)
        self.losses = LossSensor(run, self.gradients.expects_measuring)
        self._targets = TargetsRule(run.book.report, lambda place: self.losses.sites.get(place, NOWHERE))
        self._rule = MixingRule(run)
        self._exchange = exchange
        self._steps: dict[int, Where] = {}

    @property
    def certificate(self) -> Certificate:
        """What was measured so far; empty on ranks other than 0."""
        return self._rule.certificate

    def before_step(self, step: Step) -> None:
        """Measure optimizers that were made before the watch began."""
        self.gradients.add(step.optimizer)

    def after_step(self, step: Step) -> None:
        """Count the step, unless it was another optimizer's."""
        if not step.is_nested:
            self.gradients.count()
        # Before replicas are compared: where the gradients tell why they differ, nothing else is said of it.
        self._read()

    def _measured(self, number: int, optimizer: Optimizer, record: RankSketches) -> None:
        """Take this rank's record of a step, by whose number over all optimizers ranks are paired."""
        record = replace(record, targets=self.losses.take())
        exchange = self._exchange.begin()
        if exchange is None:
            return
        if exchange.compares:
            site, made = find_call_site(), self._run.sites.made(optimizer)
            shares_out = any(each.__name__ == SHARING_OPTIMIZER for each in type(optimizer).__mro__)
            self._steps[number] = Where(self._run.steps.of(optimizer), id(optimizer), site, made, shares_out)
        exchange.publish(MeasuredStep.of(record, dist.get_world_size()).to_vitals(number))
        self._read()

    def _read(self, wait: bool = False) -> None:
        """Say what has become of the steps of which all that is needed has come."""
        exchange = self._exchange.current()
        for number, judged in () if exchange is None else exchange.judged(wait=wait):
            where = self._steps.pop(number)
            if isinstance(judged, Exception):
                raise judged
            if judged is not None:
                mixing, records, tells_targets = judged
                self._rule.judge(where, records, mixing)
                if tells_targets:
                    self._targets.judge(where.step, records, mixing)

    def close(self, in_order: bool) -> None:
        """Judge what the other ranks measured last; say what has waited: for an average, or for more steps."""
        try:
            self._read(wait=in_order)
        finally:
            self._rule.close()
            self._targets.close()


@dataclass(frozen=True)
class MeasuredStep:
    """What a rank tells of a measured step; on the comparing rank, what becomes of it in the exchange's thread.

    Attributes:
        own: Its record.
        pooled: What of it is added up over the ranks, if that tells anything.
    """

    own: RankSketches
    pooled: Pooled | None

    @staticmethod
    def of(record: RankSketches, num_ranks: int) -> MeasuredStep:
        """Return what a rank has measured."""
        return MeasuredStep(record, pool(record, num_ranks))

    def to_vitals(self, number: int) -> Vitals:
        """Return what is handed to the exchange."""
        return Vitals(
            number,
            digest_record(self.own) | {TARGETS: digest_bytes(repr(self.own.targets).encode())},
            kind=GRADIENTS,
            sums=None if self.pooled is None else self.pooled.to_sums(),
            record=self.own.to_bytes,
            choose=self.choose,
            judge=self.judge,
        )

    def choose(self, comparison: Comparison) -> tuple[int, ...]:
        """Return the ranks whose records are needed."""
        return choose_ranks(comparison, self._certify(comparison))

    def judge(
        self, comparison: Comparison, told: Mapping[int, bytes]
    ) -> tuple[Mixing, list[RankSketches], bool] | None:
        """Return who learned from whom, the records it was told from, and whether they tell all targets.

        None where fewer than two ranks took the step.
        """
        records = [self.own, *(RankSketches.from_bytes(told[rank]) for rank in sorted(told) if told[rank])]
        has_all_targets = TARGETS in comparison.same or len(records) == comparison.num_ranks
        records = list(_keep_stepped_by_all(records))
        mixing = judge_step(comparison, self._certify(comparison), records)
        return mixing and (mixing, records, has_all_targets and not comparison.missing)

    def _certify(self, comparison: Comparison) -> Mixing | None:
        """Return what the sums of all ranks say; None where not all used the same, or sums say nothing."""
        if self.pooled is None or comparison.sums is None or not {LAYOUT, USED} <= set(comparison.same):
            return None
        return certify(self.pooled, comparison.sums, _list_ranks(comparison))


def _keep_stepped_by_all(records: Sequence[RankSketches]) -> Iterator[RankSketches]:
    """Yield the records without what only some ranks stepped here: another optimizer's turn on those."""
    some: set[str] = set()
    for record in records:
        if record.num_steps:
            some |= {name for name, state in zip(record.names, record.states, strict=True) if state == UNREAD}
    for record in records:
        yield record.without(some)


def _list_ranks(comparison: Comparison) -> tuple[int, ...]:
    num_all = comparison.num_ranks + len(comparison.missing)
    return tuple(rank for rank in range(num_all) if rank not in comparison.missing)


def choose_ranks(comparison: Comparison, certified: Mixing | None) -> tuple[int, ...]:
    """Return the ranks, other than 0, whose records are needed: those that differ first.

    Args:
        comparison: What digests say.
        certified: What sums say, where all ranks used the same gradients; None where they say nothing.
    """
    others = [rank for rank in _list_ranks(comparison) if rank]
    is_certain = certified is not None and certified.shape != "unidentifiable"
    if is_certain and {BEFORE, AFTER, TARGETS} <= set(comparison.same):
        return ()
    if len(others) < MAX_RANKS:
        return tuple(others)
    # Where all used the same that is not the mean, the records of some cannot tell more.
    parted = [groups for groups in comparison.differing.values() if len(groups) > 1]
    if not parted:
        return ()
    first = [ranks[0] for groups in parted for ranks in reversed(groups)]
    fewer = [rank for groups in parted for ranks in reversed(groups[1:]) for rank in ranks]
    ordered = dict.fromkeys(rank for rank in (*first, *fewer, *comparison.ungrouped, *others) if rank)
    return tuple(ordered)[: MAX_RANKS - 1]


def judge_step(comparison: Comparison, certified: Mixing | None, records: Sequence[RankSketches]) -> Mixing | None:
    """Judge a step by the records of all ranks, of some of them, or by what sums and digests alone say.

    Returns:
        None where fewer than two ranks took the step.
    """
    ranks = _list_ranks(comparison)
    num_stepped = sum(record.num_steps > 0 for record in records)
    if len(records) == len(ranks):
        return judge_records(records) if num_stepped > 1 else None
    if certified is not None and {BEFORE, AFTER} <= set(comparison.same):
        names = tuple(name for names in certified.by_parameter.values() for name in names)
        certified = replace(certified, weights={"equal": names})
    known = certified or know_nothing(_say_what_differs(comparison), ranks)
    if num_stepped < 2:
        return known
    some = judge_some(records, known.reason, ranks)
    # Where all used the same, what became of the weights alone is news.
    return some if certified is None else replace(certified, weights=some.weights)


def _say_what_differs(comparison: Comparison) -> str:
    """Say what digests tell of the used gradients of so many ranks, where not all can be asked."""
    groups = comparison.differing.get(USED, ())
    if comparison.num_ranks <= MAX_RANKS:
        return "some ranks left before they told what they used"
    if not groups:
        return f"shards, or gradients that are not there, are measured on at most {MAX_RANKS} ranks"
    most = len(groups[0])
    if 2 * most <= comparison.num_ranks or comparison.ungrouped:
        return f"{comparison.num_ranks} ranks used {len(groups)} different gradients or more"
    odd = sorted(rank for ranks in groups[1:] for rank in ranks)
    named = ", ".join(map(str, odd[:_MAX_NAMED])) + (
        f" and {len(odd) - _MAX_NAMED} more" * (len(odd) > _MAX_NAMED)
    )
    return f"rank{'s' * (len(odd) > 1)} {named} used another gradient than {most} others"
