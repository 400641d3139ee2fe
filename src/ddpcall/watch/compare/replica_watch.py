"""Compares the replicas while the script runs: vitals on every rank, what they amount to on rank 0."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ddpcall import torch_internals as internals
from ddpcall.taps import NOWHERE, CallSite, find_call_site, find_tensors
from ddpcall.watch.compare.drift import Drift, largest, read_drift
from ddpcall.watch.compare.exchange import Comparison, DetailsComparison, Exchange, RunExchange
from ddpcall.watch.compare.vitals import AT_THE_END, LOSS_SCALE, Facts, Vitals, VitalsTaker
from ddpcall.watch.rules.draws import DrawRule
from ddpcall.watch.rules.replicas import Divergence, judge_buffers, judge_same, judge_steps
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.rules.shares import PART as SHARES
from ddpcall.watch.rules.shares import ShareRule
from ddpcall.watch.rules.statistics import first_line
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.last_sites import BufferUse
from ddpcall.watch.sensors.steps import Step

LEAVE_S = 10.0
EVERY_STEP_UNTIL = 16
_UNHARMFUL_STEPS = 2
_DROPOUT = internals.DROPOUT_ND.get(())


class ReplicaWatch(Rule):
    """Takes vitals after an optimizer step, hands them to the exchange and reads what comes back.

    One optimizer leads: the first that stepped parameters of a wrapped model. Vitals are taken after its steps 1
    to 16, then after every `every`-th.

    Attributes:
        num_due: How often vitals were to be taken.
        num_compared: Steps whose vitals were compared, on rank 0.
        heard: Ranks that are known to take vitals too.

    Blind to: settings of the other optimizers; wrapped models whose process group is not the whole world.
    """

    def __init__(
        self,
        run: Run,
        exchange: RunExchange,
        every: int,
        vitals_taken: Callable[[], None],
        shares: ShareRule,
        draws: DrawRule,
    ) -> None:
        super().__init__(run)
        self._shares = shares
        self._draws = draws
        self._every = every
        self._vitals_taken = vitals_taken
        self._exchange = exchange
        self._world_size = 0
        self.num_due = self.num_compared = 0
        self.heard: set[int] = set()
        self._rank = 0
        self._taker: VitalsTaker | None = None
        self._models: nn.Module | None = None
        self._asked: deque[tuple[Comparison, BufferUse | None]] = deque()
        self._judged: set[str] = set()
        self._apart: list[int] = []
        self._look_again = 0
        self._is_ending = self._is_measuring = False
        self._was_rounding = self._was_doubted = False
        self._same_batch = self._same_rng = 0
        self._uses: list[BufferUse] = []
        self._last_compared: Comparison | None = None
        self._last_step = self._num_steps = 0
        self._numel: int | None = None
        self._started: int | None = None
        self.batch: Any = None
        self._first: Any = None
        self._forward_site = self._step_site = self._made_site = self._scheduled_site = NOWHERE

    def is_due(self, step: int) -> bool:
        """Say whether vitals are taken after a step, counted from 1; the same on every rank."""
        return self._every > 0 and (step <= EVERY_STEP_UNTIL or step % self._every == 0)

    def adopt(self, models: list[nn.Module]) -> None:
        """Take the wrapped models, those of this process that span the whole world; none: nothing is compared."""
        if not models:
            self._models = self._taker = None
            return
        self._models = models[0] if len(models) == 1 else nn.ModuleList(models)
        optimizer = None if self._taker is None else self._taker.optimizer
        self._taker = VitalsTaker(self._models, optimizer)
        self._run.is_compared = self._taker.has_parameter
        self._numel = None
        if self._every > 0:
            self._connect()

    def _connect(self) -> Exchange | None:
        """Return the exchange, begun when it is first asked for: so that this rank is known to be watched."""
        self._world_size, self._rank = dist.get_world_size(), dist.get_rank()  # also when the group is gone
        return self._exchange.begin()

    def note_inputs(self, step: int, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the wrapper was called with, for a step that is being prepared."""
        if self._taker is not None and torch.is_grad_enabled() and self.is_due(step):
            # Of several forwards the first and the last: one of them may have the same inputs everywhere, always.
            forward = (inputs, kwargs)
            self.batch = forward if self._first is None else (self._first, forward)
            self._first = self._first or forward
            self._forward_site = find_call_site()

    def before_step(self, step: Step) -> None:
        """Note the parameters that a step starts from, where the script may have sent them since the last.

        Replicas that differ after a step and are equal when the next one starts are kept equal by the script: an
        optimizer sharded by hand does so.
        """
        steps, num_sent = self._run.steps, self._run.collectives.num_sent()
        if steps.lead_done() is None or not steps.leads(step.optimizer):
            return
        self._started = None
        if self._taker is None or num_sent == 0 or not self.is_due(step.number):
            return
        if self._numel is None:
            self._numel = self._taker.numel()
        if num_sent >= self._numel:
            self._started = self._taker.digest_parameters()

    def after_step(self, step: Step) -> None:
        """Take vitals of the leading optimizer's steps."""
        # A step inside another optimizer's is not one: ZeroRedundancyOptimizer sends parameters after it.
        if step.states and not step.is_nested and self._run.steps.leads(step.optimizer) and dist.is_initialized():
            self._run.steps.expect_evaluation()
            self._stepped(step.optimizer, step.number)

    def _stepped(self, optimizer: Optimizer, step: int) -> None:
        """If they are due, take and publish the vitals of a step, and read what has come back meanwhile."""
        if self._taker is None:
            return
        self._num_steps = step
        if not self.is_due(step):
            return
        self._step_site = find_call_site()
        self._made_site = self._run.sites.optimizers.get(optimizer, NOWHERE)
        self._scheduled_site = self._run.sites.schedulers.get(optimizer, NOWHERE)
        self.num_due += 1
        exchange = self._connect()
        if exchange is None:
            return
        self._taker.optimizer, self._taker.scaler = optimizer, self._run.sites.scalers.get(optimizer)
        vitals = self._taker.take(step, self.batch, exchange.measures(step), self._tell_facts())
        exchange.publish(self._with_shares(vitals))
        batch = self.batch
        self.batch = self._first = None
        self._last_step = step
        self.read()
        if self._draws.sensor.is_open:
            sizes = {tensor.shape[0] for tensor in find_tensors(batch) if tensor.dim()}
            self._draws.looked(step, sizes, self._taker.parameter_shapes(), self._taker.device_type())
        if self._rank == 0 and self.is_due(step + 1):
            self._draws.look_at(step + 1)
        self._vitals_taken()

    def _with_shares(self, vitals: Vitals) -> Vitals:
        is_last = vitals.step == AT_THE_END
        shares = self._shares.tell(vitals.step, self._rank, vitals.parts.get("batch"), is_last)
        return replace(vitals, details={**vitals.details, SHARES: shares})

    def read(self) -> None:
        """Turn comparisons that have arrived into findings; rank 0 alone gets any."""
        exchange = self._exchange.current()
        if exchange is None:
            return
        if exchange.has_compared:
            self.heard.add(0)
        for comparison in exchange.comparisons():
            self._compare(comparison)
        while self._asked and (details := exchange.details()) is not None:
            self._explain(details)

    def _tell_facts(self) -> Callable[[], Facts]:
        facts = Facts(
            loads=self._run.sites.loads,
            scaler_loads=self._run.sites.scaler_loads,
            written=self._run.written,
            started=self._started,
            switched=self._run.sites.modes.get(False),
        )
        # Vitals are taken before the model is evaluated.
        return lambda: replace(facts, has_evaluated=self._run.sites.has_evaluated)

    def close(self, in_order: bool) -> None:
        """Finish: wait, bounded, for the last comparison and its details, unless the script failed."""
        exchange = self._exchange.current()
        try:
            if exchange is not None and not in_order:
                self._say_what_was_seen()
            elif exchange is not None:
                self._finish(exchange)
                if exchange.has_compared:
                    self.heard.add(0)
        finally:
            self._exchange.end()
            self._taker = self._models = None

    def _finish(self, exchange: Exchange) -> None:
        """Say what this rank leaves with; on rank 0, judge what is left to judge."""
        last_words = None
        if self._taker is not None and self._last_step:
            last_words = self._with_shares(self._taker.take_last(self._num_steps, self._tell_facts()))
        if not exchange.compares:
            exchange.leave(last_words)
            return exchange.serve()
        if last_words is None:
            return None
        last = exchange.compare(self._last_step, wait=True)
        self.read()
        self._look_again, self._is_ending = 0, True
        if last is not None:
            self._compare(last)
        elif self._last_compared is not None:  # it was read before, and may have been too early to look again
            self._judge(self._last_compared)
        self._judge_uses()
        self._await_answers(exchange)
        exchange.leave(last_words)
        end = exchange.compare(AT_THE_END, wait=True, wait_s=LEAVE_S)
        self._judge_steps(end)
        if end is not None:
            self._ask_for_shares(end)
            self._await_answers(exchange)
        return self._judge_end(exchange, end)

    def _say_what_was_seen(self) -> None:
        """Say that parameters differ, where the run ends before it was asked how far they are apart."""
        self.read()
        unanswered = [asked for asked, _ in self._asked if "parameters" in asked.differing]
        last = unanswered[-1] if unanswered else self._last_compared
        if last is None or "parameters" not in last.differing or self._was_rounding:
            return
        if unanswered or "parameters" not in self._judged:
            differing = {
                part: groups for part, groups in last.differing.items() if part in ("optimizer", "parameters")
            }
            self._say(Divergence(self._apart[0], differing, is_confirmed=False))

    def _await_answers(self, exchange: Exchange) -> None:
        while self._asked:
            # Without answers what this rank knows by itself must do.
            self._explain(exchange.details(wait=True) or DetailsComparison(self._last_step, missing=(-1,)))

    def _judge_end(self, exchange: Exchange, end: Comparison | None) -> None:
        """Parameters that were apart in the last step that was compared, and still are."""
        last = self._last_compared
        if last is None or "parameters" not in last.differing.keys() - self._judged:
            return
        news = [part for part in ("optimizer", "parameters") if part in last.differing.keys() - self._judged]
        differing = {part: last.differing[part] for part in news}
        is_heard = end is not None and not {groups[0][0] for groups in differing.values()} & set(end.missing)
        if end is not None and is_heard and "parameters" not in end.differing:
            del differing["parameters"]  # equal again
        if differing:
            self._judged.update(differing)
            self._ask(replace(last, differing=differing), at=AT_THE_END if is_heard else None)
        self._await_answers(exchange)

    def _judge_steps(self, last: Comparison | None) -> None:
        """Say that ranks took different numbers of steps, unless their parameters end equal, as under `Join`."""
        if (
            last is None
            or not {"optimizer", "parameters"} <= last.differing.keys()
            or self._run.book.explains_divergence()
        ):
            return
        if "modes" in last.differing and not self._apart:  # loaded on some ranks, perhaps after the last step
            return
        groups = last.differing["optimizer"]
        of_groups = zip(groups, last.digests["optimizer"], strict=True)
        counts = {rank: steps for ranks, steps in of_groups if steps is not None for rank in ranks}
        self._judged.add("parameters")  # that says why they differ
        first = self._apart[0] if self._apart else min(counts.values()) + 1
        self._run.report(judge_steps(first, groups, counts, self._step_site))

    # ---- rank 0 ---------------------------------------------------------------------------------------------

    def _compare(self, comparison: Comparison) -> None:
        if comparison.num_ranks > 1:
            self.num_compared += 1
            self.heard.update(set(range(self._world_size)) - set(comparison.missing))
        self._ask_for_shares(comparison)
        self._count_same(comparison)
        self._last_compared = comparison
        self._judge_uses()
        if "parameters" in comparison.differing:
            self._apart.append(comparison.step)
        elif not comparison.missing:
            self._apart.clear()
            if self._is_measuring and "parameters" not in self._judged:  # equal again before they were measured
                self._is_measuring = False
                self._stop_measuring()
        self._judge(comparison)

    def _judge(self, comparison: Comparison) -> None:
        """Ask what the parts are made of that differ and were not judged yet."""
        news = [part for part in ("optimizer", "parameters") if part in comparison.differing.keys() - self._judged]
        if "parameters" in news and comparison.step < self._look_again:
            news.remove("parameters")
        if "parameters" in news and not self._is_measuring:
            exchange = self._exchange.current()
            assert exchange is not None
            self._is_measuring = True
            exchange.measure_from(comparison.step)
            news = []
        if self._is_ending and "parameters" in news:
            news = []
        for parts in (news, [part for part in ("modes",) if part in comparison.differing.keys() - self._judged]):
            if parts:
                self._judged.update(parts)
                self._ask(replace(comparison, differing={part: comparison.differing[part] for part in parts}))

    def _ask_for_shares(self, comparison: Comparison) -> None:
        if self._shares.is_due(comparison.step) and not comparison.missing and comparison.num_ranks > 1:
            every = tuple((rank,) for rank in range(comparison.num_ranks))
            self._ask(replace(comparison, differing={SHARES: every}))

    def _ask(self, comparison: Comparison, use: BufferUse | None = None, at: int | None = None) -> None:
        exchange = self._exchange.current()
        assert exchange is not None
        self._asked.append((comparison, use))
        exchange.ask(comparison, at=at)

    def _say(self, divergence: Divergence) -> None:
        site = self._made_site if divergence.step <= 1 else self._scheduled_site
        divergence = replace(divergence, optimizer_site=site if site != NOWHERE else self._step_site)
        is_explained = self._run.book.explains_divergence() or self._run.will_explain()
        for finding in divergence.judge(is_explained):
            self._run.report(finding)

    def _explain(self, details: DetailsComparison) -> None:
        """Say what the answers to the oldest question tell."""
        asked, use = self._asked.popleft()
        is_last = details.step == AT_THE_END
        if SHARES in asked.differing:
            return self._shares.judge_answers(details.differing.get(SHARES, {}), details.ranks, self._world_size)
        if use is not None:
            return self._explain_buffers(use, asked.differing["buffers"], details)
        differing = dict(asked.differing)
        is_measured = "parameters" in details.measures
        if details.forgotten or ("parameters" in differing and not details.missing and not is_measured):
            self._judged.difference_update(differing)  # to be asked again
            return None
        facts = details.facts
        modes = details.differing.get("modes", {})
        if details.missing and "modes" in differing:  # what this rank knows by itself must do
            own = self._taker.details("modes") if self._taker and False in self._run.sites.modes else {}
            modes = {name: {self._rank: mode} for name, mode in own.items() if mode == "eval"}
        harmful = [name for name in modes if self._depends_on_mode(name)]
        if not harmful:
            differing.pop("modes", None)
        settings = details.differing.get("optimizer", {})
        if settings.keys() == {LOSS_SCALE} and not self._apart:  # unscaled before they were reduced
            differing.pop("optimizer")
            self._judged.discard("optimizer")
        is_complete = is_measured and not details.missing
        drifts: dict[str, Drift] = {}
        if is_complete and not _are_kept_equal(facts):
            drifts = self._judge_drifts(asked.step, details, is_last)
        if not drifts and (is_complete or self._was_rounding):
            differing.pop("parameters", None)
        if "parameters" in asked.differing.keys() & self._judged:
            self._stop_measuring()
        load = _done_on_some({rank: fact.loads for rank, fact in facts.items()})
        scaler_load = _done_on_some({rank: fact.scaler_loads for rank, fact in facts.items()})
        if "parameters" in differing and load is None and len({fact.written for fact in facts.values()}) > 1:
            self._run.confirm(drifts)
        return self._say(
            Divergence(
                self._apart[0] if drifts and self._apart else asked.step,
                differing,
                parameters=tuple(drifts),
                settings=settings,
                modules={name: {rank: str(mode) for rank, mode in modes[name].items()} for name in harmful},
                load_site=load or NOWHERE,
                scaler_site=scaler_load or self._step_site,
                mode_site=next(
                    (fact.switched for fact in facts.values() if fact.switched),
                    self._run.sites.modes.get(False, NOWHERE),
                ),
                is_confirmed=is_complete or len(self._apart) > 1,
                difference=largest(drifts.values()),
            )
        )

    def _stop_measuring(self) -> None:
        """Measuring costs 0.1 ms a parameter: only while it is open how far they are apart."""
        exchange = self._exchange.current()
        if exchange is not None:
            exchange.measure_from(sys.maxsize)

    def _explain_buffers(
        self, use: BufferUse, groups: tuple[tuple[int, ...], ...], details: DetailsComparison
    ) -> None:
        """Say what is lost of buffers that differed when the model was evaluated or saved.

        A rank that evaluates alone does so with what is saved and broadcast, if it is rank 0: that is no harm.
        """
        drifts = _read_drifts("buffers", details)
        num_evaluated = sum(fact.has_evaluated for fact in details.facts.values())
        if not drifts or "buffers" in self._judged or (use.use != "saved" and num_evaluated < 2):
            return
        self._judged.add("buffers")
        has_own, change = not all(map(self._is_batch_norms, drifts)), self._find_change(drifts)
        difference = largest(drifts.values())
        self._run.report(judge_buffers(use, groups, tuple(drifts), difference, change, has_own))

    def _find_change(self, names: Iterable[str]) -> CallSite:
        """Return the first line that changes one of these buffers, where it was seen."""
        assert self._models is not None
        places = [(self._models.get_submodule(path), name) for path, _, name in (n.rpartition(".") for n in names)]
        sites = [s.site for s in self._run.statistics if (s.module(), s.attribute) in places]
        return first_line(sites) if sites else NOWHERE

    def _is_batch_norms(self, name: str) -> bool:
        """Say whether a buffer, by its name in the models, is a batch norm's."""
        assert self._models is not None
        module = self._models.get_submodule(name.rpartition(".")[0])
        return isinstance(module, internals.NORM_BASE.get(()))

    def _judge_drifts(self, step: int, details: DetailsComparison, is_last: bool) -> dict[str, Drift]:
        """Return the parameters that are apart by more than rounding; where there are none, look again later.

        Where the rate is tiny a difference as small as rounding may be one of training. Then it is as large beside
        what was trained the next time, too.
        """
        drifts = {n: d for n, d in _read_drifts("parameters", details).items() if not d.is_rounding(step)}
        is_doubtful = all(drift.is_small(step) for drift in drifts.values())
        if drifts and (not is_doubtful or self._was_doubted or is_last):
            return drifts
        self._was_doubted = bool(drifts)
        self._was_rounding = not drifts
        self._judged.discard("parameters")
        self._look_again = 2 * step
        exchange = self._exchange.current()
        assert exchange is not None
        exchange.measure_from(self._look_again)
        return {}

    def _depends_on_mode(self, name: str) -> bool:
        assert self._models is not None
        try:
            module = self._models if name == "(root)" else self._models.get_submodule(name)
        except AttributeError:
            return False
        return _depends_on_mode(module)

    def _count_same(self, comparison: Comparison) -> None:
        if comparison.missing or comparison.num_ranks < 2:
            return
        self._same_batch = self._same_batch + 1 if "batch" in comparison.same else 0
        is_same = "rng" in comparison.same
        drops = is_same and self._models is not None and any(map(_drops, self._models.modules()))
        self._same_rng = self._same_rng + 1 if drops else 0
        is_alike = is_same and "batch" in comparison.unlike and not drops
        self._draws.compared(comparison.step, comparison.num_ranks, is_alike)
        for count, part in ((self._same_batch, "batch"), (self._same_rng, "rng")):
            if count == _UNHARMFUL_STEPS and part not in self._judged:
                self._judged.add(part)
                # A model that is never called through its wrapper has no forward there: the step's line, then.
                site = self._forward_site if self._forward_site != NOWHERE else self._step_site
                self._run.report(judge_same(part, comparison.step, comparison.num_ranks, site))

    def _judge_uses(self) -> None:
        """Evaluations and checkpoints of a step whose buffers were compared."""
        self._uses += self._run.sites.buffer_uses
        self._run.sites.buffer_uses = []
        if self._last_compared is None:
            return
        step, groups = self._last_compared.step, self._last_compared.differing.get("buffers")
        for use in self._uses:
            is_comparable = use.step == step or (use.step > step and not self.is_due(use.step))
            if is_comparable and groups and not {"buffers", use.use} & self._judged:
                self._judged.add(use.use)
                self._ask(replace(self._last_compared, differing={"buffers": groups}), use)
        self._uses = [use for use in self._uses if use.step > step]


def _depends_on_mode(module: Any) -> bool:
    if isinstance(module, internals.NORM_BASE.get(())):
        return module.track_running_stats
    return _drops(module, any_mode=True)


def _drops(module: Any, any_mode: bool = False) -> bool:
    """Say whether a module draws dropout masks now."""
    if not (any_mode or module.training):
        return False
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return module.dropout > 0
    return isinstance(module, _DROPOUT) and module.p > 0


def _are_kept_equal(facts: Mapping[int, Facts]) -> bool:
    """Say whether the script sends the parameters around before each step, so that all begin it with the same."""
    started = {fact.started for fact in facts.values()}
    return len(started) == 1 and None not in started


def _done_on_some(done: Mapping[int, tuple[int, CallSite]]) -> CallSite | None:
    """Return the line, by (times, line) of each rank, where some ranks did it more often than others."""
    most = max(done.values(), key=lambda told: told[0], default=(0, NOWHERE))
    return most[1] if len({times for times, _ in done.values()}) > 1 else None


def _read_drifts(part: str, details: DetailsComparison) -> dict[str, Drift]:
    """Return how far apart the tensors are that differ, by name."""
    measures = details.measures.get(part, {})
    return {name: read_drift(measures.get(name, {})) for name in details.differing.get(part, {})}
