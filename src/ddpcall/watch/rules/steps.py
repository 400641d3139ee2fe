"""Optimizer steps: gradients that nobody reduced are harm when they are used."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ddpcall import torch_internals as internals
from ddpcall.findings import Finding
from ddpcall.taps import NOWHERE, CallSite, Undo, find_call_site, in_backward, remove_handles
from ddpcall.watch.compare.replica_watch import ReplicaWatch
from ddpcall.watch.events import Emit, Event, EventKind, Guard
from ddpcall.watch.findings_book import FindingsBook, Status
from ddpcall.watch.models import Models
from ddpcall.watch.rules.averaging import AveragingWatch
from ddpcall.watch.rules.diagnose import diagnose
from ddpcall.watch.rules.strays import StrayWatch
from ddpcall.watch.rules.suspects import Suspects
from ddpcall.watch.sensors.collectives import CollectiveLog, Mark
from ddpcall.watch.sensors.compiled import CompiledWatch
from ddpcall.watch.sensors.gradients import GradientSensor
from ddpcall.watch.sensors.last_sites import LastSites
from ddpcall.watch.sensors.locate import WeightLocator, has_compiled
from ddpcall.watch.sensors.reducer_state import ReducerState, Unreduced, address_of, nonzero
from ddpcall.watch.sensors.sharded import ShardedWatch
from ddpcall.watch.step_count import StepCount


class StepWatch:
    """Judges the ledgers when an optimizer is about to use the gradients."""

    def __init__(
        self,
        models: Models,
        count: StepCount,
        collectives: CollectiveLog,
        replicas: ReplicaWatch,
        suspects: Suspects,
        averaging: AveragingWatch,
        trail: LastSites,
        compiled: CompiledWatch,
        sharded: ShardedWatch,
        gradients: GradientSensor,
        stepping: Callable[[list[ReducerState]], None],
        book: FindingsBook,
        emit: Emit,
        guard: Guard,
    ) -> None:
        """Take the books, and who else wants to hear of steps."""
        self._models = models
        self._count = count
        self._collectives = collectives
        self._replicas = replicas
        self._suspects = suspects
        self._averaging = averaging
        self._trail = trail
        self._strays = StrayWatch(emit)
        self._compiled = compiled
        self._sharded = sharded
        self._gradients = gradients
        self._models_stepped = stepping
        self._book = book
        self._emit = emit
        self._guard = guard
        self._views: dict[int, OptimizerView] = {}
        self._stepping: list[int] = []
        self._judged_after: set[int] = set()
        self._locator: WeightLocator | None = None
        self._held: tuple[Hashable, Event] | None = None
        self._located: dict[Hashable, CallSite] = {}
        self.numel = 0

    def attach(self) -> Undo:
        """Hear of every optimizer's steps; returns the undo."""
        return remove_handles(
            register_optimizer_step_pre_hook(partial(self._guard, self._before_step)),
            register_optimizer_step_post_hook(partial(self._guard, self._after_step)),
        )

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._count.begin(optimizer)
        if id(optimizer) in self._stepping:  # an earlier step of its raised
            del self._stepping[self._stepping.index(id(optimizer)) :]
        self._stepping.append(id(optimizer))
        view = self._view(optimizer)
        self._gradients.add(optimizer)
        if self._count.of(optimizer) == 1:
            parameters = (each for group in optimizer.param_groups for each in group["params"])
            self.numel = max(self.numel, sum(each.numel() for each in parameters if not is_lazy(each)))
        self._count_models(optimizer, view)
        self._models_stepped(view.ledgers)
        self._compiled.before_step(view.get)
        for event in self._sharded.before_step(self._count.of(optimizer), view.parameters.__contains__):
            self._emit(event)
        self._averaging.look()
        if self._held is not None and self._book.status(self._held[0]) is Status.WITHDRAWN:
            self.stop_locating()
        if self._count.lead_done() is not None and self._count.leads(optimizer):
            self._replicas.starting(self._count.of(optimizer), self._collectives.num_sent())
        if in_backward():
            self._stepped_in_backward(optimizer, view)
        elif _is_judged_after(optimizer, args, kwargs):
            self._judged_after.add(id(optimizer))
        else:
            self._judge(optimizer, view)

    def _count_models(self, optimizer: Optimizer, view: OptimizerView) -> None:
        """Count a step on each wrapped model that it moves; of several optimizers the one with most."""
        steps = self._count.of(optimizer)
        for ledger in view.ledgers:
            for each in (ledger, *ledger.sharing):
                each.num_steps = max(each.num_steps, steps)
        if view.is_sharded:
            self._sharded.num_steps = max(self._sharded.num_steps, steps)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) in self._stepping:
            del self._stepping[self._stepping.index(id(optimizer)) :]
        if in_backward():
            return
        if not self._stepping:
            self._gradients.count()
        view = self._view(optimizer)
        if id(optimizer) in self._judged_after:
            self._judged_after.discard(id(optimizer))
            self._judge(optimizer, view)
        for ledger in view.ledgers:
            ledger.end_step()
        self._collectives.end_step()
        if view.ledgers:
            self._averaging.stepped()
        # A step inside another optimizer's step is not one: ZeroRedundancyOptimizer sends parameters after it.
        if view.ledgers and not self._stepping:
            self._compare_replicas(optimizer)

    def _compare_replicas(self, optimizer: Optimizer) -> None:
        if self._count.leads(optimizer) and dist.is_initialized():
            self._count.evaluation_due = True
            self._replicas.stepped(optimizer, self._count.of(optimizer))

    def _view(self, optimizer: Optimizer) -> OptimizerView:
        groups = optimizer.param_groups
        signature = (self._models.structure, *(len(group["params"]) for group in groups))
        view = self._views.get(id(optimizer))
        if view is None or view.signature != signature:
            view = self._views[id(optimizer)] = self._look_at(optimizer, signature)
        return view

    def _look_at(self, optimizer: Optimizer, signature: tuple[int, ...]) -> OptimizerView:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        ledgers = {
            id(self._models.owner[id(p)]): self._models.owner[id(p)]
            for p in parameters
            if id(p) in self._models.owner
        }
        return OptimizerView(
            signature,
            {id(parameter): weakref.ref(parameter) for parameter in parameters},
            list(ledgers.values()),
            self._find_unowned(parameters),
            self._find_strays(parameters),
            any(type(parameter).__name__ == "DTensor" for parameter in parameters),
        )

    def _find_strays(self, parameters: list[Tensor]) -> list[int]:
        """Return what is in no wrapped model, by id."""
        wrappers = [ddp for ledger in self._models.ledgers if (ddp := ledger.ddp()) is not None]
        wrapped = {id(parameter) for ddp in wrappers for parameter in ddp.module.parameters()}
        return [id(p) for p in parameters if p.requires_grad and id(p) not in wrapped]

    def _find_unowned(self, parameters: list[Tensor]) -> dict[int, tuple[str, ReducerState]]:
        unowned = {}
        stepped = {id(parameter) for parameter in parameters}
        for ledger in self._models.ledgers:
            ddp = ledger.ddp()
            if ddp is None:
                continue
            for name, parameter in ddp.module.named_parameters():
                if (
                    id(parameter) in stepped
                    and id(parameter) not in self._models.owner
                    and name not in ddp.parameters_to_ignore
                ):
                    unowned[id(parameter)] = (name, ledger)
        return unowned

    def _stepped_in_backward(self, optimizer: Optimizer, view: OptimizerView) -> None:
        early = [ledger for ledger in view.ledgers if ledger.armed and _is_distributed(ledger)]
        for ledger in early:
            own = internals.IN_BACKWARD_OPTIMIZERS
            if any(own.of(parameter, None) is not None for parameter in ledger.parameters()):
                continue
            names = tuple(name for key, name in ledger.names.items() if key in view.parameters)
            self._emit(Event(EventKind.STEPPED_EARLY, find_call_site(), self._count.of(optimizer), names))

    def _judge(self, optimizer: Optimizer, view: OptimizerView) -> None:
        """Gradients are about to be used: those that nobody reduced are harm."""
        step = self._count.of(optimizer)
        for ledger in view.ledgers:
            if not _is_distributed(ledger):
                continue
            if ledger.dirty or ledger.detached:
                self._judge_ledger(ledger, view, step)
            elif not ledger.had_backward:
                self._suspect_written(ledger, view, step)
        if view.unowned:
            self._judge_unowned(view, step)
        if view.strays and self._models.ledgers and dist.is_initialized():
            self._look_at_strays(optimizer, view, step)

    def _look_at_strays(self, optimizer: Optimizer, view: OptimizerView, step: int) -> None:
        strays = [stray for key in view.strays if (stray := view.get(key)) is not None and stray.grad is not None]
        if strays:
            reductions = sum(ledger.num_reductions for ledger in self._models.ledgers)
            created = self._trail.optimizers.get(optimizer, NOWHERE)
            site = self._trail.additions.get(optimizer, created)
            self._strays.look(optimizer, strays, step, reductions, site)

    def _judge_ledger(self, ledger: ReducerState, view: OptimizerView, step: int) -> None:
        by_blame: dict[int, tuple[Unreduced, list[int]]] = {}
        for key, blame in ledger.dirty.items():
            by_blame.setdefault(id(blame), (blame, []))[1].append(key)
        for key, site in ledger.detached.items():
            blame = ledger.blame_detached(site)
            by_blame.setdefault(id(blame), (blame, []))[1].append(key)
        for blame, keys in by_blame.values():
            used = [key for key in keys if self._is_used(key, blame, view)]
            if not used:
                continue
            names = tuple(ledger.names[key] for key in used)
            steps_in_forward = blame.kind is EventKind.IN_FORWARD and ledger.is_in_forward()
            site = find_call_site() if steps_in_forward else blame.site
            harm = (blame.kind, blame.site, id(ledger))
            event = Event(blame.kind, site, step, names, blame.others, blame.facts(ledger))
            if self._were_reduced(used, view, ledger.unarmed_since):
                self._suspect(harm, diagnose(event), used, view)
            elif self._book.status(harm) is not Status.WITHDRAWN:
                self._averaging.doubt(harm, step, [p for key in used if (p := view.get(key)) is not None])
                if blame.kind is EventKind.RAW_WEIGHTS and not has_compiled():
                    self._report_located(harm, event, used)
                else:
                    self._book.report(diagnose(event), harm)

    def _suspect_written(self, ledger: ReducerState, view: OptimizerView, step: int) -> None:
        """Gradients without any backward: the script wrote them, perhaps the same on all ranks."""
        used = [key for key in ledger.names if nonzero(view.gradients([key]))]
        if used:
            names, facts = tuple(ledger.names[key] for key in used), {"model": ledger.name}
            finding = diagnose(Event(EventKind.WRITTEN, find_call_site(), step, names, (), facts))
            self._suspect((finding.cause, finding.file, finding.line, id(ledger)), finding, used, view)

    def _suspect(self, harm: Hashable, finding: Finding, keys: list[int], view: OptimizerView) -> None:
        if self._replicas.is_due(finding.step):
            self._suspects.add(harm, finding, view.gradients(keys))

    def _is_used(self, key: int, blame: Unreduced, view: OptimizerView) -> bool:
        parameter = view.get(key)
        if parameter is None or parameter.grad is None:
            return False
        if not nonzero([parameter.grad]):
            # Computed as zero, past the wrapper: not synchronised. Zeroed since: nothing to synchronise.
            version = internals.TENSOR_VERSION.of(parameter.grad)
            return blame.kind is EventKind.BYPASSED and blame.versions.get(key) == version
        return blame.kind is not EventKind.AUTOGRAD_GRAD or address_of(parameter.grad) != blame.gradient

    def _were_reduced(self, keys: list[int], view: OptimizerView, since: Mark | None = None) -> bool:
        return self._collectives.covers(view.gradients(keys), since)

    def _judge_unowned(self, view: OptimizerView, step: int) -> None:
        by_origin: dict[tuple[CallSite, int], list[int]] = {}
        for key, (_, ledger) in view.unowned.items():
            parameter = view.get(key)
            if parameter is not None and nonzero([parameter.grad]) and _is_distributed(ledger):
                by_origin.setdefault((self._models.origins.get(key, NOWHERE), id(ledger)), []).append(key)
        for (origin, _), keys in by_origin.items():
            if self._were_reduced(keys, view):
                continue
            site = origin if origin != NOWHERE else find_call_site()
            names = tuple(view.unowned[key][0] for key in keys)
            self._emit(Event(EventKind.UNOWNED, site, step, names, (), {"seen": origin != NOWHERE}))

    # ---- raw weights: the line is looked for in the next step ------------------------------------------------

    def _report_located(self, harm: Hashable, event: Event, keys: list[int]) -> None:
        """Report that weights were used directly, once the line that uses them was seen in the next step."""
        if harm in self._located:
            self._book.report(diagnose(replace(event, site=self._located[harm])), harm)
        elif self._locator is None:
            self._book.hold(harm, diagnose(event))
            self._held, self._locator = (harm, event), WeightLocator(keys, self._models.owner[keys[0]])
            self._locator.start()
        elif self._held is not None and harm == self._held[0]:
            first = self._held[1]
            self._located[harm] = self._locator.site or first.site
            self.stop_locating()
            self._book.report(diagnose(replace(first, site=self._located[harm])), harm)
        else:
            self._book.report(diagnose(event), harm)

    def stop_locating(self) -> None:
        """Look no longer for the line that uses weights directly."""
        if self._locator is not None:
            self._locator.stop()
            self._locator = None

    def close(self) -> None:
        """Judge what has waited for other ranks."""
        self._strays.close()


class OptimizerView:
    """An optimizer's parameters as the ledgers see them; made anew when the structure changes."""

    def __init__(
        self,
        signature: tuple[int, ...],
        parameters: dict[int, weakref.ref[Tensor]],
        ledgers: list[ReducerState],
        unowned: dict[int, tuple[str, ReducerState]],
        strays: list[int],
        is_sharded: bool,
    ) -> None:
        """Take what `Attachment` found."""
        self.signature = signature
        self.parameters = parameters
        self.ledgers = ledgers
        self.unowned = unowned
        self.strays = strays
        self.is_sharded = is_sharded

    def get(self, key: int) -> Tensor | None:
        """Return a parameter by id, None when this optimizer has none such."""
        reference = self.parameters.get(key)
        return None if reference is None else reference()

    def gradients(self, keys: Iterable[int]) -> list[Tensor]:
        """Return the gradients that are there, of parameters by id."""
        parameters = [parameter for key in keys if (parameter := self.get(key)) is not None]
        return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _is_judged_after(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> bool:
    """Say whether gradients are made or may be reduced in the step: by a closure, a hook, an optimizer's own way.

    Torch calls the optimizer's own hooks after the global ones. Source: `profile_hook_step` in
    torch/optim/optimizer.py.
    """
    has_own_way = not type(optimizer).step.__module__.startswith("torch.")
    return has_own_way or bool(internals.OPTIMIZER_STEP_PRE_HOOKS.of(optimizer, ())) or _has_closure(args, kwargs)


def _has_closure(args: Any, kwargs: dict[str, Any]) -> bool:
    # torch hands the hook the arguments of `step` with the optimizer itself in front.
    values = [value for value in args if not isinstance(value, Optimizer)] + [kwargs.get("closure")]
    return any(callable(value) for value in values)


def _is_distributed(ledger: ReducerState) -> bool:
    """Say whether there still is a process group for the gradients to be reduced over."""
    return dist.is_initialized()
