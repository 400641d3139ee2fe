"""Compares the replicas while the script runs: vitals on every rank, what they amount to on rank 0."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ddpcall import torch_internals as internals
from ddpcall.findings import Finding
from ddpcall.taps import NOWHERE, CallSite, find_call_site
from ddpcall.watch.compare.drift import Drift, largest, read_drift
from ddpcall.watch.compare.exchange import Comparison, DetailsComparison, Exchange, find_store
from ddpcall.watch.compare.store_protocol import AT_THE_END
from ddpcall.watch.compare.vitals import LOSS_SCALE, Details, Vitals, VitalsTaker
from ddpcall.watch.rules.diagnose import Divergence, diagnose_divergence
from ddpcall.watch.rules.suspects import Suspects
from ddpcall.watch.sensors.last_sites import BufferUse, LastSites

WAIT_S = 15.0
LEAVE_S = 10.0
EVERY_STEP_UNTIL = 16
LOADED = "@load_state_dict"
GRADIENTS = "@gradients"
SWITCHED = "@mode"
STARTED = "@started"
SCALER_LOADED = "@scaler_load_state_dict"
MEASURED = "@measured "
EVALUATED = "@evaluated"
_UNHARMFUL_STEPS = 2


@dataclass(frozen=True)
class Sites:
    """This rank's lines for what can only be seen by comparing.

    Attributes:
        forward: The wrapper's last forward.
        step: The last optimizer step.
        created: Where the optimizer was made.
        scheduled: Where its scheduler was last stepped.
    """

    forward: CallSite = NOWHERE
    step: CallSite = NOWHERE
    created: CallSite = NOWHERE
    scheduled: CallSite = NOWHERE


class ReplicaWatch:
    """Takes vitals after an optimizer step, hands them to the exchange and reads what comes back.

    One optimizer leads: the first that stepped parameters of a wrapped model. Vitals are taken after its steps 1
    to 16, then after every `every`-th.

    Attributes:
        num_due: How often vitals were to be taken.
        num_compared: Steps whose vitals were compared, on rank 0.
        heard: Ranks that are known to take vitals too.
        trouble: Why no more is compared.

    Blind to: settings of the other optimizers; wrapped models whose process group is not the whole world.
    """

    def __init__(
        self,
        every: int,
        trail: LastSites,
        suspects: Suspects,
        emit: Callable[[Finding, bool], None],
        withdraw: Callable[[Finding], None],
        explained: Callable[[], bool],
        vitals_taken: Callable[[], None],
    ) -> None:
        """Take what to compare and where it goes.

        Args:
            every: Steps between vitals.
            trail: This rank's lines.
            suspects: Gradients that explain why parameters differ, where they differ too.
            emit: Gets findings, and whether a better one may follow.
            withdraw: Gets those that a better one replaces.
            explained: Says whether another finding explains why parameters differ.
            vitals_taken: Is called after vitals were taken.
        """
        self._every = every
        self._trail = trail
        self._suspects = suspects
        self._emit = emit
        self._withdraw = withdraw
        self._explained = explained
        self._vitals_taken = vitals_taken
        self._exchange: Exchange | None = None
        self._world_size = 0
        self.num_due = self.num_compared = 0
        self.heard: set[int] = set()
        self.trouble = ""
        self._rank = 0
        self._taker: VitalsTaker | None = None
        self._models: nn.Module | None = None
        self._asked: Comparison | None = None
        self._preliminary: list[Finding] = []
        self._judged: set[str] = set()
        self._apart: list[int] = []
        self._look_again = 0
        self._was_rounding = self._was_doubted = False
        self._same_batch = self._same_rng = 0
        self._uses: list[BufferUse] = []
        self._uses_asked: list[BufferUse] = []
        self._last_compared: Comparison | None = None
        self._last_step = self._num_steps = 0
        self._numel: int | None = None
        self._started: int | None = None
        self._has_told_start = False
        self.batch: Any = None
        self._first: Any = None
        self.sites = Sites()

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
        self._numel = None
        if self._every > 0:
            self._connect()

    def compares(self, name: str) -> bool:
        """Say whether a parameter's replicas are compared, by its name in the wrapped module."""
        return self._taker is not None and self._taker.has_parameter(name)

    def _connect(self) -> Exchange | None:
        """Return the exchange, made when it is first asked for: so that this rank is known to be watched."""
        if self._exchange is None:
            store = find_store(WAIT_S)
            if store is None:
                self.trouble = "there is no store that all ranks share"
                return None
            self._world_size = dist.get_world_size()
            self._rank = dist.get_rank()  # also when the process group is gone
            self._exchange = Exchange(store, self._rank, self._world_size, wait_s=WAIT_S)
        return self._exchange

    def note_inputs(self, step: int, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the wrapper was called with, for a step that is being prepared."""
        if self._taker is not None and torch.is_grad_enabled() and self.is_due(step):
            # Of several forwards the first and the last: one of them may have the same inputs everywhere, always.
            forward = (inputs, kwargs)
            self.batch = forward if self._first is None else (self._first, forward)
            self._first = self._first or forward
            self.sites = replace(self.sites, forward=find_call_site())

    def starting(self, step: int, num_sent: int) -> None:
        """Note the parameters that a step starts from, where the script may have sent them since the last.

        Replicas that differ after a step and are equal when the next one starts are kept equal by the script: an
        optimizer sharded by hand does so.

        Args:
            step: The step that begins.
            num_sent: Elements that the script sent since the last one.
        """
        self._started = None
        if self._taker is None or num_sent == 0 or not self.is_due(step):
            return
        if self._numel is None:
            self._numel = self._taker.numel()
        if num_sent >= self._numel:
            self._started = self._taker.digest_parameters()

    def stepped(self, optimizer: Optimizer, step: int) -> None:
        """If they are due, take and publish the vitals of a step, and read what has come back meanwhile."""
        if self._taker is None:
            return
        self._num_steps = step
        if not self.is_due(step):
            return
        self.sites = replace(
            self.sites,
            step=find_call_site(),
            created=self._trail.optimizers.get(optimizer, NOWHERE),
            scheduled=self._trail.schedulers.get(optimizer, NOWHERE),
        )
        self.num_due += 1
        exchange = self._connect()
        if exchange is None:
            return
        self._taker.optimizer, self._taker.scaler = optimizer, self._trail.scalers.get(optimizer)
        exchange.publish(self._taker.take(step, self.batch))
        self.batch = self._first = None
        self._last_step = step
        parts = exchange.asked(step)
        if parts:
            exchange.post_details(step, self._details(parts))
        self.read()
        self._vitals_taken()

    def read(self) -> None:
        """Turn comparisons that have arrived into findings; rank 0 alone gets any."""
        if self._exchange is None:
            return
        self.trouble = self._exchange.failure or ""
        if self._exchange.has_compared:
            self.heard.add(0)
        for comparison in self._exchange.comparisons():
            self._compare(comparison)
        details = self._exchange.details()
        if details is not None:
            self._explain(details)

    def close(self, in_order: bool) -> None:
        """Finish: wait, bounded, for the last comparison and its details, unless the script failed."""
        if self._exchange is None:
            return
        try:
            if in_order and self._taker is not None:
                self._finish(self._exchange)
        finally:
            self.trouble = self._exchange.failure or ""
            if self._exchange.has_compared:
                self.heard.add(0)
            self._exchange.close()
            self._exchange = self._taker = self._models = None

    def _finish(self, exchange: Exchange) -> None:
        exchange.finish()
        if not self._last_step:
            return
        if self._rank != 0:
            self._tell_steps(exchange)
        last = exchange.compare(self._last_step, wait=True)
        self.read()
        self._look_again = 0  # after what was read, which may have put it off beyond the last step
        if last is not None:
            self._compare(last)
        elif self._last_compared is not None:  # it was read before, and may have been too early to look again
            self._judge(self._last_compared)
        self._judge_uses()
        if self._asked is not None:  # the answers would have come in a later step
            exchange.ask_details(self._asked, now=True)
        # Until the comparing rank closes: it may ask again what it asked, for this is the last step.
        while parts := exchange.asked(self._last_step, wait=True):
            exchange.post_details(self._last_step, self._details(parts))
        if self._asked is not None:
            details = exchange.details(wait=True)
            # Without answers what this rank knows by itself must do.
            own = DetailsComparison(self._last_step, (), (), {"modes": self._own_modes()})
            self._explain(own if details is None or details.missing else details, is_last=True)
        if self._rank == 0:
            self._tell_steps(exchange)
            self._judge_steps(exchange.compare(AT_THE_END, wait=True, wait_s=LEAVE_S))

    def _tell_steps(self, exchange: Exchange) -> None:
        """Tell how many steps this rank took, and of the parameters it leaves with."""
        assert self._taker is not None
        parts = {"optimizer": self._num_steps, "parameters": self._taker.digest_parameters()}
        exchange.publish(Vitals(AT_THE_END, parts))

    def _judge_steps(self, last: Comparison | None) -> None:
        """Say that ranks took different numbers of steps, unless their parameters end equal, as under `Join`."""
        if last is None or not {"optimizer", "parameters"} <= last.differing.keys() or self._explained():
            return
        groups = last.differing["optimizer"]
        of_groups = zip(groups, last.digests["optimizer"], strict=True)
        counts = {rank: steps for ranks, steps in of_groups if steps is not None for rank in ranks}
        found = Divergence(
            min(counts.values()) + 1, {"steps": groups}, settings={"steps": counts}, step_site=self.sites.step
        )
        self._say(found)
        self._preliminary = []

    def _own_modes(self) -> dict[str, dict[int, Any]]:
        if self._taker is None or False not in self._trail.modes:
            return {}
        modes = {name: {self._rank: mode} for name, mode in self._taker.details("modes").items() if mode == "eval"}
        return {**modes, SWITCHED: {self._rank: _write_site(self._trail.modes[False])}}

    def _details(self, parts: tuple[str, ...]) -> dict[str, Details]:
        assert self._taker is not None
        details = {part: self._taker.details(part) for part in parts}
        times, site = self._trail.loads
        if "parameters" in details:
            _add_measures(details["parameters"], self._taker.measure_parameters())
            details["parameters"][LOADED] = f"{times} {_write_site(site)}" if times else "0"
            details["parameters"][GRADIENTS] = self._suspects.digest() or 0
            self._has_told_start = self._started is not None
            if self._started is not None:
                details["parameters"][STARTED] = self._started
        if "optimizer" in details and self._trail.scaler_loads[0]:
            times, site = self._trail.scaler_loads
            details["optimizer"][SCALER_LOADED] = f"{times} {_write_site(site)}"
        if "buffers" in details:
            _add_measures(details["buffers"], self._taker.measure_buffers())
            # With the rank, so that it is told from all of them.
            details["buffers"][EVALUATED] = f"{self._rank} {self._trail.has_evaluated}"
        if "modes" in details and False in self._trail.modes:
            details["modes"][SWITCHED] = _write_site(self._trail.modes[False])
        return details

    # ---- rank 0 ---------------------------------------------------------------------------------------------

    def _compare(self, comparison: Comparison) -> None:
        if comparison.num_ranks > 1:
            self.num_compared += 1
            self.heard.update(set(range(self._world_size)) - set(comparison.missing))
        self._count_same(comparison)
        self._note_buffers(comparison)
        if "parameters" in comparison.differing:
            self._apart.append(comparison.step)
        elif not comparison.missing:
            self._apart.clear()
        self._judge(comparison)

    def _judge(self, comparison: Comparison) -> None:
        """Ask for details of what differs and was not judged yet."""
        parts = [part for part in ("optimizer", "parameters", "modes") if part in comparison.differing]
        news = [part for part in parts if part not in self._judged]
        if "parameters" in news and comparison.step < self._look_again:
            news.remove("parameters")
        if not news:
            return
        self._judged.update(news)
        differing = {part: comparison.differing[part] for part in news}
        # Which modules differ decides about modes; what was rounding before is so again, as a rule.
        if "modes" not in news and not self._was_rounding:
            self._say(Divergence(comparison.step, differing, is_confirmed=False), in_haste=True)
        self._ask(comparison, differing)

    def _ask(self, comparison: Comparison, differing: dict[str, tuple[tuple[int, ...], ...]]) -> None:
        """Ask for details of the parts that differ, together with those that were asked for and not told yet."""
        asked = {} if self._asked is None else self._asked.differing
        self._asked = replace(comparison, differing={**asked, **differing})
        assert self._exchange is not None
        self._exchange.ask_details(self._asked)

    def _say(self, divergence: Divergence, in_haste: bool = False) -> None:
        for finding in diagnose_divergence(self._with_sites(divergence), self._explained()):
            self._preliminary.append(finding)
            self._emit(finding, in_haste)

    def _with_sites(self, divergence: Divergence) -> Divergence:
        sites = self.sites
        first = divergence.step <= 1
        optimizer = sites.created if first else sites.scheduled
        return replace(divergence, optimizer_site=optimizer if optimizer != NOWHERE else sites.step)

    def _explain(self, details: DetailsComparison, is_last: bool = False) -> None:
        """Replace what was said in haste by what the details tell."""
        if self._asked is None:
            return
        asked, self._asked = self._asked, None
        for finding in self._preliminary:
            self._withdraw(finding)
        self._preliminary = []
        parameters = details.differing.get("parameters", {})
        modes = details.differing.get("modes", {})
        differing = dict(asked.differing)
        load = next((value for value in _values(parameters, LOADED) if not value.startswith("0")), "")
        settings = details.differing.get("optimizer", {})
        scaler_load = _loaded_on_some(settings.pop(SCALER_LOADED, {}), details.ranks)
        if settings.keys() == {LOSS_SCALE} and not self._apart:  # unscaled before they were reduced
            del differing["optimizer"]
            self._judged.discard("optimizer")
        switch = next(iter(_values(modes, SWITCHED)), "")
        self._explain_buffers(differing.pop("buffers", ()), details)
        harmful = [name for name in modes if not name.startswith("@") and self._depends_on_mode(name)]
        if not harmful:
            differing.pop("modes", None)
        is_complete = "parameters" in details.differing and not details.missing
        drifts: dict[str, Drift] = {}
        is_kept_equal = is_complete and self._has_told_start and STARTED not in parameters
        if is_complete and not is_kept_equal:
            drifts = self._judge_drifts(details.step, parameters, is_last)
        if not drifts and (is_complete or self._was_rounding):
            differing.pop("parameters", None)
        if "parameters" in differing and GRADIENTS in parameters and not load:
            self._suspects.convict()
        self._say(
            Divergence(
                self._apart[0] if drifts and self._apart else asked.step,
                differing,
                parameters=tuple(drifts),
                settings=settings,
                modules={name: {rank: str(mode) for rank, mode in modes[name].items()} for name in harmful},
                load_site=_read_site(load.split(" ", 1)[1]) if " " in load else None,
                scaler_site=scaler_load or self.sites.step,
                mode_site=_read_site(switch) if switch else None,
                is_confirmed=is_complete or len(self._apart) > 1,
                difference=largest(drifts.values()),
            )
        )
        self._preliminary = []

    def _explain_buffers(self, groups: tuple[tuple[int, ...], ...], details: DetailsComparison) -> None:
        """Say what is lost of buffers that differed when the model was evaluated or saved.

        A rank that evaluates alone does so with what is saved and broadcast, if it is rank 0: that is no harm.
        """
        buffers = details.differing.get("buffers", {})
        drifts = _read_drifts(buffers)
        evaluated = [value for value in _values(buffers, EVALUATED) if value.endswith("True")]
        uses, self._uses_asked = self._uses_asked, []
        harmful = [use for use in uses if drifts and (use.use == "saved" or len(evaluated) > 1)]
        for use in harmful[:1]:
            self._judged.add("buffers")
            found = Divergence(
                use.step,
                {"buffers": groups},
                parameters=tuple(drifts),
                difference=largest(drifts.values()),
                buffer_site=use.site,
                buffer_use=use.use,
            )
            for finding in diagnose_divergence(found, False):
                self._emit(finding, False)

    def _judge_drifts(self, step: int, parameters: dict[str, dict[int, Any]], is_last: bool) -> dict[str, Drift]:
        """Return the parameters that are apart by more than rounding; where there are none, look again later.

        Where the rate is tiny a difference as small as rounding may be one of training. Then it is as large beside
        what was trained the next time, too.
        """
        drifts = {name: d for name, d in _read_drifts(parameters).items() if not d.is_rounding(step)}
        is_doubtful = all(drift.is_small(step) for drift in drifts.values())
        if drifts and (not is_doubtful or self._was_doubted or is_last):
            return drifts
        self._was_doubted = bool(drifts)
        self._was_rounding = not drifts
        self._judged.discard("parameters")
        self._look_again = 2 * step
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
        drops = self._models is not None and any(map(_drops, self._models.modules()))
        self._same_rng = self._same_rng + 1 if "rng" in comparison.same and drops else 0
        for count, part in ((self._same_batch, "batch"), (self._same_rng, "rng")):
            if count == _UNHARMFUL_STEPS and part not in self._judged:
                self._judged.add(part)
                ranks = tuple(range(comparison.num_ranks))
                # A model that is never called through its wrapper has no forward there: the step's line, then.
                site = self.sites.forward if self.sites.forward != NOWHERE else self.sites.step
                same = Divergence(comparison.step, {part: (ranks,)}, forward_site=site)
                for finding in diagnose_divergence(same, False):
                    self._emit(finding, False)

    def _note_buffers(self, comparison: Comparison) -> None:
        self._last_compared = comparison
        self._judge_uses()

    def _judge_uses(self) -> None:
        """Evaluations and checkpoints of a step whose buffers were compared."""
        self._uses += self._trail.buffer_uses
        self._trail.buffer_uses = []
        if self._last_compared is None:
            return
        step, groups = self._last_compared.step, self._last_compared.differing.get("buffers")
        for use in self._uses:
            is_comparable = use.step == step or (use.step > step and not self.is_due(use.step))
            if is_comparable and groups and not {"buffers", use.use} & self._judged:
                self._judged.add(use.use)
                self._uses_asked.append(use)
                self._ask(self._last_compared, {"buffers": groups})
        self._uses = [use for use in self._uses if use.step > step]


def _depends_on_mode(module: Any) -> bool:
    if isinstance(module, internals.NORM_BASE.get(())):
        return module.track_running_stats
    return _drops(module, any_mode=True)


def _drops(module: Any, any_mode: bool = False) -> bool:
    """Say whether a module draws dropout masks now."""
    if not (any_mode or module.training):
        return False
    if isinstance(module, internals.DROPOUT_ND.get(())):
        return module.p > 0
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return module.dropout > 0
    return False


def _values(details: dict[str, dict[int, Any]], name: str) -> list[str]:
    return [str(value) for value in details.get(name, {}).values()]


def _loaded_on_some(loads: Mapping[int, Any], ranks: tuple[int, ...]) -> CallSite | None:
    """Return the line that loaded a GradScaler's state, where some ranks loaded it more often than others."""
    times = {rank: int(loads.get(rank, "0").partition(" ")[0]) for rank in ranks}
    most = max(times, key=times.__getitem__, default=0)
    return _read_site(loads[most].partition(" ")[2]) if len(set(times.values())) > 1 else None


def _add_measures(details: Details, measures: dict[str, str]) -> None:
    details.update((MEASURED + name, text) for name, text in measures.items())


def _read_drifts(details: dict[str, dict[int, Any]]) -> dict[str, Drift]:
    """Return how far apart the tensors are that differ, by name."""
    names = [name for name in details if not name.startswith("@")]
    return {name: read_drift(details.get(MEASURED + name, {})) for name in names}


def _write_site(site: CallSite) -> str:
    return json.dumps(asdict(site))


def _read_site(text: str) -> CallSite:
    site = json.loads(text)
    caller = site.pop("called_from")
    return CallSite(**site, called_from=None if caller is None else CallSite(**caller))
