"""Find models as they are wrapped, and put taps on them: everything here is undone by `close`.

Entry points are patched on their classes (DDP, nn.Module, Parameter, torch.compile, torch.autograd.grad): calls
that are rare, none in a training step's inner loop. Modules under a wrapper get forward taps on the instance;
parameters that a reducer owns get a gradient-arrival hook.
"""

from __future__ import annotations

import functools
import sys
import traceback
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import DDP as ReplicatedModule
from torch.distributed._composable.replicate import _ReplicateState
from torch.nn.modules import module as module_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ddpcall.findings import Finding
from ddpcall.taps import (
    NOWHERE,
    CallSite,
    ForwardTap,
    Undo,
    find_call_site,
    in_backward,
    is_lazy,
    replace_attribute,
    strip_forward_taps,
)
from ddpcall.watch.collectives import CollectiveLog, Mark
from ddpcall.watch.compiled import CompiledWatch
from ddpcall.watch.events import Event, EventKind
from ddpcall.watch.hooks import HookWatch
from ddpcall.watch.locate import WeightLocator
from ddpcall.watch.precision import PrecisionWatch
from ddpcall.watch.reducer_ledger import Entry, ReducerLedger, Unreduced, nonzero, owned_parameters
from ddpcall.watch.replica_watch import ReplicaWatch
from ddpcall.watch.report import WatchError
from ddpcall.watch.sharded import ShardedWatch
from ddpcall.watch.trail import Trail

Emit = Callable[[Event], None]


class Attachment:
    """The taps of one watched run on this rank."""

    def __init__(
        self,
        emit: Emit,
        *,
        every: int = 0,
        compared: Callable[[Finding, bool], None] = lambda finding, in_haste: None,
        withdraw: Callable[[Finding], None] = lambda finding: None,
        explained: Callable[[], bool] = lambda: False,
    ) -> None:
        """Attach to torch; models are found as they are wrapped from now on.

        Args:
            emit: Gets every event, on the thread it happened on.
            every: Ranks compare vitals every so many optimizer steps; 0 for never.
            compared: Gets the findings that only a comparison shows, on rank 0.
            withdraw: Gets such a finding when a better one takes its place.
            explained: Whether a finding says already why parameters differ.
        """
        self._emit = emit
        self.ledgers: list[ReducerLedger] = []
        self._by_ddp: dict[int, ReducerLedger] = {}
        self._owner: dict[int, ReducerLedger] = {}
        self._origins: dict[int, CallSite] = {}
        self._frozen: set[int] = set()
        self._structure = 0
        self._views: dict[int, OptimizerView] = {}
        self.steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self.collectives = CollectiveLog()
        self._unarmed_since: dict[int, Mark] = {}
        self._stepping: list[int] = []
        self._locator: WeightLocator | None = None
        self._pending: Event | None = None
        self._inside_entry = self._evaluating = self._has_failed = False
        self._applying = 0
        self._tap = ForwardTap(self._observe_forward, self._is_quiet)
        self._undo = ExitStack()
        self.trail = Trail(self._is_watched, self._may_use_buffers)
        self.replicas = ReplicaWatch(
            every, self.trail, compared, withdraw, lambda: explained() or self._pending is not None
        )
        self._lead: weakref.ref[Optimizer] | None = None
        self.sharded = ShardedWatch(self.keep)
        self._hooks = HookWatch(emit, self._step, self.keep, self._hook_registered)
        self._compiled = CompiledWatch(emit, self._step, self.keep, self._hooks.tap)
        precision = PrecisionWatch(emit, self._step, self.keep)
        with ExitStack() as stack:
            for patch in (
                strip_forward_taps,
                self._patch_ddp,
                self._patch_module,
                self._patch_parameter,
                self._patch_autograd,
                self._hook_registrations,
                self._hook_optimizers,
                self.collectives.attach,
                self._hooks.attach,
                self._compiled.attach,
                precision.attach,
                self.sharded.attach,
                self.trail.attach,
            ):
                stack.callback(patch())
            self._undo = stack.pop_all()

    def _guard(self, work: Callable[..., Any], *args: Any) -> None:
        """Do the watch's own work: an error of ours is said once and never reaches the script."""
        try:
            work(*args)
        except WatchError:
            raise
        except Exception:
            if not self._has_failed:
                self._has_failed = True
                print(
                    f"ddpcall watch: an error of its own, please report it\n{traceback.format_exc()}",
                    file=sys.stderr,
                )

    def keep(self, undo: Undo) -> None:
        """Take an undo, for the end."""
        self._undo.callback(undo)

    def _step(self) -> int:
        """Return the number of the optimizer step that is being prepared, from 1."""
        return max(self.steps.values(), default=0) + 1

    def _hook_registered(self, module: nn.Module, kind: str, hook: Any) -> None:
        if isinstance(getattr(hook, "__self__", None), _ReplicateState) and kind == "forward_pre":
            self._guard(self._announce, module)
        self._compiled.hook_registered(module, kind, hook)
        self.sharded.hook_registered(module, kind, hook)

    def explain_crash(self, error: BaseException) -> None:
        """Emit an event if a bypass caused the exception that ends the script."""
        event = self.sharded.explain(error, self._step())
        if event is not None:
            self._emit(event)

    def close(self, in_order: bool = True) -> None:
        """Take everything off again; what was waiting for a better line or a last comparison is emitted first.

        Args:
            in_order: Whether the script came to its end; other ranks are not waited for where it did not.
        """
        with ExitStack() as last:  # each of these, though an earlier one raises its finding
            last.callback(self.detach)
            last.callback(self._guard, self.replicas.close, in_order)
            last.callback(self._guard, self._compiled.close)
            last.callback(self._guard, self._release_pending)

    def detach(self) -> None:
        """Take everything off, and say nothing."""
        for ledger in self.ledgers:
            ledger.close()
        self._undo.close()

    # ---- finding models -------------------------------------------------------------------------------------

    def _patch_ddp(self) -> Undo:
        init, post_forward = DistributedDataParallel.__init__, DistributedDataParallel._post_forward
        pre_forward = DistributedDataParallel._pre_forward
        name = "require_backward_grad_sync"

        @functools.wraps(init)
        def __init__(ddp: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
            init(ddp, *args, **kwargs)
            self._guard(self.adopt, ddp)

        @functools.wraps(pre_forward)
        def _pre_forward(ddp: DistributedDataParallel, *inputs: Any, **kwargs: Any) -> Any:
            if id(ddp) in self._by_ddp:
                self._guard(self._note_inputs, inputs, kwargs)
            return pre_forward(ddp, *inputs, **kwargs)

        @functools.wraps(post_forward)
        def _post_forward(ddp: DistributedDataParallel, output: Any) -> Any:
            output = post_forward(ddp, output)
            ledger = self._by_ddp.get(id(ddp))
            if ledger is not None:
                self._guard(ledger.passed, output)
            return output

        def get_sync(ddp: DistributedDataParallel) -> bool:
            return ddp.__dict__[name]

        def set_sync(ddp: Any, value: bool) -> None:
            ddp.__dict__[name] = value
            ledger = self._by_ddp.get(id(ddp))
            if ledger is not None:
                self._guard(self._sync_switched, ledger, value)

        switch = ReplicatedModule.set_requires_gradient_sync

        @functools.wraps(switch)
        def set_requires_gradient_sync(module: Any, requires_gradient_sync: bool) -> None:
            switch(module, requires_gradient_sync)
            for ledger in self.ledgers:
                if not requires_gradient_sync and ledger.contains(module):
                    ledger.switched_off = find_call_site()

        with ExitStack() as stack:
            stack.callback(replace_attribute(ReplicatedModule, switch.__name__, set_requires_gradient_sync))
            stack.callback(replace_attribute(DistributedDataParallel, "__init__", __init__))
            for method, patched in (("_pre_forward", _pre_forward), ("_post_forward", _post_forward)):
                disabled = torch._disable_dynamo(patched, recursive=False)
                stack.callback(replace_attribute(DistributedDataParallel, method, disabled))
            stack.callback(replace_attribute(DistributedDataParallel, name, property(get_sync, set_sync)))
            return stack.pop_all().close

    def adopt_wrapped(self, module: nn.Module) -> None:
        """Watch a module that was wrapped before the watch began, however it was."""
        if isinstance(module, DistributedDataParallel):
            self.adopt(module)
        for hook in list(module._forward_pre_hooks.values()):
            state = getattr(hook, "__self__", None)
            if isinstance(state, _ReplicateState) and hasattr(state, "_ddp"):
                self.adopt(state._ddp)
            else:
                self._hook_registered(module, "forward_pre", hook)

    def adopt(self, ddp: DistributedDataParallel) -> None:
        """Watch one DDP: arrivals of the gradients its reducer owns, forwards of the modules under it.

        Blind to: DDP's python reducer and delayed all-reduce, which reduce without being armed.
        """
        if ddp._use_python_reducer or ddp._delay_all_reduce_all_params or id(ddp) in self._by_ddp:
            return
        owned = dict(owned_parameters(ddp))
        if dist.get_world_size(ddp.process_group) == 1:
            return
        announced = next((self._owner[id(p)] for p in owned.values() if id(p) in self._owner), None)
        if announced is not None and announced.is_announced:
            self._found_reducer(announced, ddp)
            return
        ledger = ReducerLedger(
            weakref.ref(ddp, self._forget), type(ddp.module).__name__, {id(p): n for n, p in owned.items()}
        )
        self._open_ledger(ledger, ddp.module, list(owned.values()))
        self._by_ddp[id(ddp)] = ledger
        self._adopt_replicas()

    def _open_ledger(self, ledger: ReducerLedger, root: nn.Module, owned: list[nn.Parameter]) -> None:
        for parameter in owned:
            previous = self._owner.get(id(parameter))
            if previous is not None:
                previous.close()
            self._owner[id(parameter)] = ledger
            handle: Any = parameter.register_post_accumulate_grad_hook(ledger.arrive)
            ledger.undo.append(_remove_hook(handle, weakref.ref(parameter)))
        ledger.on_first_unarmed = partial(self._mark_unarmed, ledger)
        self._frozen.update(id(p) for p in root.parameters() if id(p) not in ledger.names)
        self.trail.adopt(root)
        for module in root.modules():
            self._tap_module(module, ledger)
        self.ledgers.append(ledger)
        self._structure += 1

    def _mark_unarmed(self, ledger: ReducerLedger) -> None:
        # Only what the script sends from now on can be the reduction that these gradients still need.
        self._unarmed_since[id(ledger)] = self.collectives.mark()

    def _announce(self, root: nn.Module) -> None:
        """Watch a module under `replicate`, which makes its DDP in the first call, if one ever comes."""
        if dist.get_world_size() == 1:
            return
        owned = {name: p for name, p in root.named_parameters() if p.requires_grad and not is_lazy(p)}
        ledger = ReducerLedger(lambda: None, type(root).__name__, {id(p): n for n, p in owned.items()})
        ledger.is_announced = True
        self._open_ledger(ledger, root, list(owned.values()))

    def _found_reducer(self, ledger: ReducerLedger, ddp: DistributedDataParallel) -> None:
        ledger.is_announced = False
        ledger.ddp = weakref.ref(ddp, self._forget)
        self._by_ddp[id(ddp)] = ledger
        self._adopt_replicas()

    def _adopt_replicas(self) -> None:
        """Compare the replicas of wrapped models that span the world and are meant to stay equal."""
        wrappers = [ddp for ledger in self.ledgers if (ddp := ledger.ddp()) is not None]
        models = [ddp.module for ddp in wrappers if _is_replicated(ddp)]
        if models:
            self.replicas.adopt(models)

    def _note_inputs(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lead = None if self._lead is None else self._lead()
        step = 1 if lead is None else self.steps.get(lead, 0) + 1
        if torch.is_grad_enabled() and self.replicas.is_due(step):
            self.replicas.batch = (inputs, kwargs)
            self.replicas.sites = replace(self.replicas.sites, forward=find_call_site())

    def _is_watched(self, module: nn.Module) -> bool:
        return id(module) in self._by_ddp or any(ledger.contains(module) for ledger in self.ledgers)

    def _may_use_buffers(self, module: nn.Module) -> int | None:
        """Return the steps done, if this module's buffers may be rank-local now: not broadcast since the last."""
        lead = None if self._lead is None else self._lead()
        for ledger in self.ledgers:
            ddp = ledger.ddp()
            if ddp is None or lead is None or module not in (ddp, ddp.module) or not ddp.modules_buffers:
                continue
            # Counters such as num_batches_tracked need no averaging.
            buffers = [buffer for buffer in ddp.modules_buffers if buffer.is_floating_point()]
            if not ledger.forwarded and buffers and not self.collectives.covers(buffers):
                return self.steps[lead]
        return None

    def _forget(self, reference: Any) -> None:
        self._by_ddp = {key: ledger for key, ledger in self._by_ddp.items() if ledger.ddp is not reference}

    def _tap_module(self, module: nn.Module, ledger: ReducerLedger) -> None:
        if id(module) in ledger.modules or isinstance(module, torch.jit.ScriptModule):
            return
        ledger.modules[id(module)] = weakref.ref(module)
        self.keep(self._tap.put(module))

    # ---- forwards -------------------------------------------------------------------------------------------

    def _is_quiet(self) -> bool:
        # In a training step the first is true; the others are looked at outside the wrapper alone.
        return (
            DistributedDataParallel._active_ddp_module is not None
            or self._inside_entry
            or not (torch.is_grad_enabled() or self._evaluating)
        )

    def _observe_evaluation(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The first forward under no_grad after a step: an evaluation past the wrapper, in eval mode."""
        self._evaluating = False
        if not module.training:
            for ledger in self.ledgers:
                if ledger.contains(module) and (ddp := ledger.ddp()) is not None:
                    self.trail.use_buffers(ddp, "evaluated", ledger.contains)
        return original(*args, **kwargs)

    def _observe_forward(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A grad-enabled forward of a watched module, outside every wrapper's: a bypass if gradients follow."""
        if not torch.is_grad_enabled():
            return self._observe_evaluation(module, original, args, kwargs)
        if in_backward():
            return original(*args, **kwargs)
        ledgers = [ledger for ledger in self.ledgers if ledger.contains(module)]
        if not ledgers:
            return original(*args, **kwargs)
        ledger = ledgers[-1]
        site = find_call_site(ledger.contains)
        self._inside_entry = True
        try:
            outputs = original(*args, **kwargs)
        finally:
            self._inside_entry = False
        self._guard(ledger.enter, Entry(site), outputs)
        return outputs

    # ---- windows --------------------------------------------------------------------------------------------

    def _sync_switched(self, ledger: ReducerLedger, value: bool) -> None:
        if not value:
            if ledger.sync_off is None:
                ledger.sync_off_forwards = ledger.sync_off_reduced = 0
            # `replicate` hands its own switch on in its forward: the line that turned that is the one to blame.
            ledger.sync_off = ledger.switched_off or find_call_site()
            return
        ledger.switched_off = None
        off, ledger.sync_off = ledger.sync_off, None
        if off is not None and ledger.sync_off_reduced and not ledger.sync_off_forwards:
            self._emit(Event(EventKind.NO_SYNC_WITHOUT_EFFECT, off, self._step()))

    # ---- parameters -----------------------------------------------------------------------------------------

    def _patch_module(self) -> Undo:
        apply = nn.Module._apply

        @functools.wraps(apply)
        def _apply(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            if self._applying:
                return apply(module, *args, **kwargs)
            touched = [ledger for ledger in self.ledgers if self._touches(module, ledger)]
            before = [(ledger, _accumulators(self._parameters_of(ledger))) for ledger in touched]
            self._applying += 1
            try:
                return apply(module, *args, **kwargs)
            finally:
                self._applying -= 1
                for ledger, nodes in before:
                    self._guard(self._compare_accumulators, ledger, nodes)

        return replace_attribute(nn.Module, "_apply", _apply)

    def _touches(self, module: nn.Module, ledger: ReducerLedger) -> bool:
        return ledger.contains(module) or any(child is ledger.ddp() for child in module.modules())

    def _parameters_of(self, ledger: ReducerLedger) -> list[nn.Parameter]:
        ddp = ledger.ddp()
        return [] if ddp is None else [p for p in ddp._module_parameters if id(p) in ledger.names]

    def _compare_accumulators(self, ledger: ReducerLedger, before: list[Any]) -> None:
        """A conversion that changes dtype or device makes a new AccumulateGrad; the reducer hangs on the old one.

        Source: `VariableHooks::set_data` in torch/csrc/autograd/variable.cpp.
        """
        parameters = self._parameters_of(ledger)
        if len(parameters) != len(before):
            return
        for parameter, old in zip(parameters, before, strict=True):
            if old is not None and _accumulators([parameter])[0] is not old:
                ledger.detached.setdefault(id(parameter), find_call_site())

    def _patch_parameter(self) -> Undo:
        slot: Any = torch._C.TensorBase.requires_grad
        in_place = nn.Parameter.requires_grad_

        def set_requires_grad(parameter: Tensor, value: bool) -> None:
            slot.__set__(parameter, value)
            if value and id(parameter) in self._frozen:
                self._note_origin(parameter)

        @functools.wraps(in_place)
        def requires_grad_(parameter: Any, requires_grad: bool = True) -> Tensor:
            if requires_grad and id(parameter) in self._frozen:
                self._note_origin(parameter)
            return in_place(parameter, requires_grad)

        with ExitStack() as stack:
            changed = property(slot.__get__, set_requires_grad)
            stack.callback(replace_attribute(nn.Parameter, "requires_grad", changed))
            stack.callback(replace_attribute(nn.Parameter, "requires_grad_", requires_grad_))
            return stack.pop_all().close

    def _note_origin(self, parameter: Tensor) -> None:
        self._origins.setdefault(id(parameter), find_call_site())
        self._structure += 1

    def _hook_registrations(self) -> Undo:
        """See modules and parameters that are put into a wrapped model."""

        def registered_module(parent: nn.Module, name: str, child: nn.Module | None) -> None:
            ledger = next((ledger for ledger in self.ledgers if ledger.contains(parent)), None)
            if ledger is None or child is None:
                return
            for module in child.modules():
                self._tap_module(module, ledger)
            for parameter in child.parameters():
                if id(parameter) not in ledger.names:
                    self._note_origin(parameter)

        def registered_parameter(parent: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            ledger = next((ledger for ledger in self.ledgers if ledger.contains(parent)), None)
            if ledger is not None and parameter is not None and id(parameter) not in ledger.names:
                self._note_origin(parameter)

        handles = (
            module_hooks.register_module_module_registration_hook(registered_module),
            module_hooks.register_module_parameter_registration_hook(registered_parameter),
        )
        return partial(_remove_all, handles)

    # ---- gradients without arrival ---------------------------------------------------------------------------

    def _patch_autograd(self) -> Undo:
        grad = torch.autograd.grad

        @functools.wraps(grad)
        def taking(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            taken = grad(outputs, inputs, *args, **kwargs)
            if not torch.compiler.is_compiling() and self.ledgers:
                self._guard(self._gradients_taken, [inputs] if isinstance(inputs, Tensor) else inputs)
            return taken

        return replace_attribute(torch.autograd, "grad", taking)

    def _gradients_taken(self, inputs: Iterable[Any]) -> None:
        parameters = [parameter for parameter in inputs if id(parameter) in self._owner]
        if not parameters:
            return
        site = find_call_site()
        for parameter in parameters:
            ledger = self._owner[id(parameter)]
            blame = Unreduced(EventKind.AUTOGRAD_GRAD, site, gradient=_storage(parameter.grad))
            if id(parameter) not in ledger.dirty:
                ledger.dirty[id(parameter)] = blame

    # ---- optimizer steps -------------------------------------------------------------------------------------

    def _hook_optimizers(self) -> Undo:
        handles = (
            register_optimizer_step_pre_hook(lambda *given: self._guard(self._before_step, *given)),
            register_optimizer_step_post_hook(lambda *given: self._guard(self._after_step, *given)),
        )
        return partial(_remove_all, handles)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.steps[optimizer] = self.steps.get(optimizer, 0) + 1
        if id(optimizer) in self._stepping:  # an earlier step of its raised
            del self._stepping[self._stepping.index(id(optimizer)) :]
        self._stepping.append(id(optimizer))
        view = self._view(optimizer)
        self._compiled.before_step(view.get)
        for event in self.sharded.before_step(self.steps[optimizer], view.parameters.__contains__):
            self._emit(event)
        if in_backward():
            self._stepped_in_backward(optimizer, view)
        elif not _has_closure(args, kwargs):
            self._judge(optimizer, view)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) in self._stepping:
            del self._stepping[self._stepping.index(id(optimizer)) :]
        if in_backward():
            return
        view = self._view(optimizer)
        if _has_closure(args, kwargs):
            self._judge(optimizer, view)
        for ledger in view.ledgers:
            ledger.end_step()
        self.collectives.end_step()
        # A step inside another optimizer's step is not one: ZeroRedundancyOptimizer sends parameters after it.
        if view.ledgers and not self._stepping:
            self._compare_replicas(optimizer)

    def _compare_replicas(self, optimizer: Optimizer) -> None:
        lead = None if self._lead is None else self._lead()
        if lead is None:
            lead = optimizer
            self._lead = weakref.ref(optimizer)
        if lead is not optimizer or not dist.is_initialized():
            return
        self._evaluating = True
        step = self.steps[optimizer]
        if self.replicas.is_due(step):
            self.replicas.sites = replace(
                self.replicas.sites,
                step=find_call_site(),
                created=self.trail.optimizers.get(optimizer, NOWHERE),
                scheduled=self.trail.schedulers.get(optimizer, NOWHERE),
            )
            self.replicas.stepped(optimizer, step)

    def _view(self, optimizer: Optimizer) -> OptimizerView:
        groups = optimizer.param_groups
        signature = (self._structure, *(len(group["params"]) for group in groups))
        view = self._views.get(id(optimizer))
        if view is None or view.signature != signature:
            view = self._views[id(optimizer)] = self._look_at(optimizer, signature)
        return view

    def _look_at(self, optimizer: Optimizer, signature: tuple[int, ...]) -> OptimizerView:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        ledgers = {id(self._owner[id(p)]): self._owner[id(p)] for p in parameters if id(p) in self._owner}
        return OptimizerView(
            signature,
            {id(parameter): weakref.ref(parameter) for parameter in parameters},
            list(ledgers.values()),
            self._find_unowned(parameters),
        )

    def _find_unowned(self, parameters: list[Tensor]) -> dict[int, tuple[str, ReducerLedger]]:
        unowned = {}
        stepped = {id(parameter) for parameter in parameters}
        for ledger in self.ledgers:
            ddp = ledger.ddp()
            if ddp is None:
                continue
            for name, parameter in ddp.module.named_parameters():
                if (
                    id(parameter) in stepped
                    and id(parameter) not in self._owner
                    and name not in ddp.parameters_to_ignore
                ):
                    unowned[id(parameter)] = (name, ledger)
        return unowned

    def _stepped_in_backward(self, optimizer: Optimizer, view: OptimizerView) -> None:
        early = [ledger for ledger in view.ledgers if ledger.armed and _is_distributed(ledger)]
        for ledger in early:
            if any(hasattr(parameter, "_in_backward_optimizers") for parameter in self._parameters_of(ledger)):
                continue
            names = tuple(name for key, name in ledger.names.items() if key in view.parameters)
            self._emit(Event(EventKind.STEPPED_EARLY, find_call_site(), self.steps[optimizer], names))

    def _judge(self, optimizer: Optimizer, view: OptimizerView) -> None:
        """Gradients are about to be used: those that nobody reduced are harm."""
        step = self.steps[optimizer]
        for ledger in view.ledgers:
            if (ledger.dirty or ledger.detached) and _is_distributed(ledger):
                self._judge_ledger(ledger, view, step)
        if view.unowned:
            self._judge_unowned(view, step)

    def _judge_ledger(self, ledger: ReducerLedger, view: OptimizerView, step: int) -> None:
        by_blame: dict[int, tuple[Unreduced, list[int]]] = {}
        for key, blame in ledger.dirty.items():
            by_blame.setdefault(id(blame), (blame, []))[1].append(key)
        for key, site in ledger.detached.items():
            blame = ledger.blame_detached(site)
            by_blame.setdefault(id(blame), (blame, []))[1].append(key)
        for blame, keys in by_blame.values():
            used = [key for key in keys if self._is_used(key, blame, view)]
            if used and not self._were_reduced(used, view, self._unarmed_since.get(id(ledger))):
                names = tuple(ledger.names[key] for key in used)
                event = Event(blame.kind, blame.site, step, names, blame.others, blame.facts(ledger))
                self._emit_or_wait(event, used)

    def _is_used(self, key: int, blame: Unreduced, view: OptimizerView) -> bool:
        parameter = view.get(key)
        if parameter is None or parameter.grad is None:
            return False
        if not nonzero([parameter.grad]):
            # Computed as zero, past the wrapper: not synchronised. Zeroed since: nothing to synchronise.
            return blame.kind is EventKind.BYPASSED and blame.versions.get(key) == parameter.grad._version
        return blame.kind is not EventKind.AUTOGRAD_GRAD or _storage(parameter.grad) != blame.gradient

    def _were_reduced(self, keys: list[int], view: OptimizerView, since: Mark | None = None) -> bool:
        gradients = [parameter.grad for key in keys if (parameter := view.get(key)) is not None]
        return self.collectives.covers([gradient for gradient in gradients if gradient is not None], since)

    def _judge_unowned(self, view: OptimizerView, step: int) -> None:
        by_origin: dict[tuple[CallSite, int], list[int]] = {}
        for key, (_, ledger) in view.unowned.items():
            parameter = view.get(key)
            if parameter is not None and parameter.grad is not None and _is_distributed(ledger):
                by_origin.setdefault((self._origins.get(key, NOWHERE), id(ledger)), []).append(key)
        for (origin, _), keys in by_origin.items():
            if self._were_reduced(keys, view):
                continue
            site = origin if origin != NOWHERE else find_call_site()
            names = tuple(view.unowned[key][0] for key in keys)
            self._emit(Event(EventKind.UNOWNED, site, step, names))

    # ---- raw weights: the line is looked for in the next step ------------------------------------------------

    def _emit_or_wait(self, event: Event, keys: list[int]) -> None:
        if event.kind is not EventKind.RAW_WEIGHTS:
            self._emit(event)
            return
        if self._locator is None:
            self._pending = event
            self._locator = WeightLocator(keys, next(ledger for ledger in self.ledgers if keys[0] in ledger.names))
            self._locator.start()
            return
        site, self._locator = self._locator.stop(), None
        if site is not None:
            self._pending = Event(
                event.kind, site, self._pending.step if self._pending else event.step, event.parameters
            )
        self._release_pending()

    def _release_pending(self) -> None:
        if self._locator is not None:
            self._locator.stop()
            self._locator = None
        if self._pending is not None:
            self._emit(self._pending)
            self._pending = None


class OptimizerView:
    """An optimizer's parameters as the ledgers see them; made anew when the structure changes."""

    def __init__(
        self,
        signature: tuple[int, ...],
        parameters: dict[int, weakref.ref[Tensor]],
        ledgers: list[ReducerLedger],
        unowned: dict[int, tuple[str, ReducerLedger]],
    ) -> None:
        """Take what `Attachment` found."""
        self.signature = signature
        self.parameters = parameters
        self.ledgers = ledgers
        self.unowned = unowned

    def get(self, key: int) -> Tensor | None:
        """Return a parameter by id, None when this optimizer has none such."""
        reference = self.parameters.get(key)
        return None if reference is None else reference()


def _has_closure(args: Any, kwargs: dict[str, Any]) -> bool:
    # torch hands the hook the arguments of `step` with the optimizer itself in front.
    values = [value for value in args if not isinstance(value, Optimizer)] + [kwargs.get("closure")]
    return any(callable(value) for value in values)


def _is_replicated(ddp: DistributedDataParallel) -> bool:
    """Say whether all ranks are meant to hold the same model after every step."""
    hooks = " ".join(type(state).__name__ for _, state in ddp._comm_hooks)
    return "LocalSGD" not in hooks and dist.get_world_size(ddp.process_group) == dist.get_world_size()


def _is_distributed(ledger: ReducerLedger) -> bool:
    """Say whether there still is a process group for the gradients to be reduced over."""
    return dist.is_initialized()


def _accumulators(parameters: Iterable[Tensor]) -> list[Any]:
    get_edge = torch.autograd.graph.get_gradient_edge
    return [get_edge(parameter).node if parameter.requires_grad else None for parameter in parameters]


def _storage(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.untyped_storage().data_ptr()


def _remove_all(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()


def _remove_hook(handle: Any, reference: weakref.ref[Tensor]) -> Undo:
    def undo() -> None:
        handle.remove()
        parameter = reference()
        if parameter is not None and not parameter._post_accumulate_grad_hooks:
            setattr(parameter, "_post_accumulate_grad_hooks", None)  # noqa: B010 (typed as a dict, None at first)

    return undo
