"""Find models as they are wrapped, and see how they are entered and when synchronization is switched off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpcall import torch_internals as internals
from ddpcall.taps import (
    CallSite,
    ForwardTap,
    Undo,
    find_call_frames,
    find_call_site,
    hear_calls,
    in_backward,
    is_lazy,
    site_of,
    undo_all,
)
from ddpcall.watch.output.watched import DELAYED_ALL_REDUCE, PYTHON_REDUCER
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.hooks import can_be_tapped
from ddpcall.watch.sensors.reducer_state import Entry, ReducerState, owned_parameters
from ddpcall.watch.sensors.stacks import StackWatch

_NEEDED = (
    internals.ACTIVE_DDP_MODULE,
    internals.DDP_PRE_FORWARD,
    internals.DDP_POST_FORWARD,
    internals.MODULE_PARAMETERS,
    internals.PREPARE_FOR_BACKWARD,
    internals.CHECK_REDUCER_FINALIZED,
    internals.GET_BACKWARD_STATS,
    internals.EXECUTION_ENGINE,
    internals.CURRENT_GRAPH_TASK,
)


class WrapWatch:
    """Opens a reducer state for every DDP and `replicate`, and taps the forwards of the modules under it.

    Blind to: DDP's python reducer and delayed all-reduce, which reduce without being armed.
    """

    def __init__(
        self,
        run: Run,
        stacks: StackWatch,
        compare: Callable[[list[nn.Module]], None],
        called: Callable[[int, tuple[Any, ...], dict[str, Any]], None],
        window_without_effect: Callable[[CallSite], None],
    ) -> None:
        """Take the run, and who hears of what is seen.

        Args:
            run: Its models are found here.
            stacks: Notes the wrappers that are not followed.
            compare: Gets the wrapped modules whose replicas are meant to stay equal, all of them each time.
            called: Hears of a wrapper's forward: the leading optimizer's next step, and the inputs.
            window_without_effect: Hears of a `no_sync()` that came too late for its backward.
        """
        self._run = run
        self._models = run.models
        self._count = run.steps
        self._contain = run.contain
        self._stacks = stacks
        self._compare = compare
        self._called = called
        self._window_without_effect = window_without_effect
        self._inside_entry = False
        self._compared: list[ReducerState] = []
        self._tap = ForwardTap(self._observe_forward, self._is_quiet)

    def attach(self) -> Undo:
        """Find every DDP that is made from now on; returns the undo."""
        internals.require(*_NEEDED)
        return undo_all(self._hear())

    def _hear(self) -> Iterator[Undo]:
        ddp, reducer, contain = DistributedDataParallel, dist.Reducer, self._contain
        yield hear_calls(ddp, "__init__", after=partial(contain, self._made))
        yield hear_calls(ddp, "register_comm_hook", after=partial(contain, self._hooked))
        yield hear_calls(ddp, "__setattr__", after=partial(contain, self._was_set), is_traced=False)
        entering, passed, prepared = (
            partial(contain, hear) for hear in (self._entering, self._passed, self._prepared)
        )
        yield hear_calls(ddp, internals.DDP_PRE_FORWARD.name, before=entering, is_traced=False)
        yield hear_calls(ddp, internals.DDP_POST_FORWARD.name, after=passed, is_traced=False)
        yield hear_calls(reducer, "prepare_for_backward", after=prepared, is_traced=False)
        replicated = internals.REPLICATED_MODULE.get(None)
        if replicated is not None:
            yield hear_calls(replicated, "set_requires_gradient_sync", after=partial(contain, self._switched))

    def _made(self, _: None, ddp: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        self.adopt(ddp)

    def _hooked(self, *args: Any, **kwargs: Any) -> None:
        self._adopt_replicas()  # local SGD is a hook of the reducer's

    def _was_set(self, _: None, ddp: nn.Module, name: str, value: Any) -> None:
        if name == "require_backward_grad_sync":
            self._sync_switched(ddp, value)

    def _switched(self, _: None, module: nn.Module, requires_gradient_sync: bool) -> None:
        """`replicate` is told whether to synchronize."""
        for state in self._models.states_with(module):
            state.announce_switch(None if requires_gradient_sync else find_call_site())

    def _entering(self, ddp: nn.Module, *inputs: Any, **kwargs: Any) -> None:
        if self._models.state_of(ddp) is not None:
            self._called(self._count.preparing_lead(), inputs, kwargs)

    def _passed(self, output: Any, ddp: nn.Module, before: Any) -> None:
        state = self._models.state_of(ddp)
        if state is not None:
            state.passed(output)

    def _prepared(self, _: None, reducer: Any, *args: Any, **kwargs: Any) -> None:
        """Note whose reducer was prepared for a backward, by its forward or by anybody else."""
        for state in self._models.reducer_states:
            ddp = state.ddp()
            if ddp is not None and ddp.reducer is reducer:
                state.arm(reducer)

    def adopt(self, ddp: DistributedDataParallel, earlier: bool = False) -> None:
        """Watch one DDP, if its process group has more than one rank.

        Args:
            ddp: The wrapper.
            earlier: Whether it was made before the watch began. Its replicas are compared once an optimizer
                steps them: it may be a model of yesterday, and ranks agree on the order of steps alone.
        """
        if not dist.is_initialized() or dist.get_world_size(ddp.process_group) == 1:
            return
        if self._models.state_of(ddp) is not None:
            return
        in_python, delayed = (entry.of(ddp, False) for entry in internals.OTHER_REDUCERS.values())
        if in_python or delayed:
            self._stacks.note(PYTHON_REDUCER if in_python else DELAYED_ALL_REDUCE)
            return
        if internals.DELAYED_PARAMETERS.of(ddp, ()):  # the reducer's own parameters are followed, these are not
            self._stacks.note(DELAYED_ALL_REDUCE)
        owned = dict(owned_parameters(ddp, earlier))
        owner = self._models.owner
        state = next((owner[id(p)] for p in owned.values() if id(p) in owner), None)
        if state is None or not state.come_true():
            state = ReducerState(type(ddp.module).__name__, {id(p): n for n, p in owned.items()})
            self._open(state, ddp.module, list(owned.values()))
        self._models.bind(state, ddp)
        if earlier:
            state.presume(ddp.reducer)
        else:
            self._compared.append(state)
            self._adopt_replicas()

    def stepping(self, states: Iterable[ReducerState]) -> None:
        """Note that an optimizer is about to step parameters of these reducers."""
        for state in states:
            if state.use():
                self._compared.append(state)
                self._adopt_replicas()

    def hook_registered(self, module: nn.Module, kind: str, hook: Any) -> None:
        """See `replicate` by the hook it registers; it makes its DDP in the first call, if one ever comes."""
        is_first = kind == "forward_pre"
        if is_first and isinstance(getattr(hook, "__self__", None), internals.REPLICATE_STATE.get(())):
            self._contain(self._announce, module)

    def _announce(self, root: nn.Module) -> None:
        known = any(state.is_announced for state in self._models.states_with(root))
        if known or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        owned = {name: p for name, p in root.named_parameters() if p.requires_grad and not is_lazy(p)}
        names = {id(parameter): name for name, parameter in owned.items()}
        state = ReducerState(type(root).__name__, names, is_announced=True, wrapper="replicate")
        self._open(state, root, list(owned.values()))

    def _open(self, state: ReducerState, root: nn.Module, owned: list[nn.Parameter]) -> None:
        self._models.open(state, root, owned)
        self._run.sites.adopt(root)
        self.tap(root.modules(), state)

    def tap(self, modules: Iterable[nn.Module], state: ReducerState) -> None:
        """Count modules as parts of a wrapped model, and tap their forwards."""
        new = state.add_modules(filter(can_be_tapped, modules))
        self._run.keep(self._tap.put(*new))

    def _adopt_replicas(self) -> None:
        """Compare the replicas of wrapped models that span the world and are meant to stay equal."""
        wrappers = [ddp for state in self._compared if (ddp := state.ddp()) is not None]
        models = [ddp.module for ddp in wrappers if _is_replicated(ddp)]
        self._compare(models)

    # ---- forwards -------------------------------------------------------------------------------------------

    def _is_quiet(self) -> bool:
        # In a training step the first is true; the others are looked at outside the wrapper alone.
        return (
            internals.is_ddp_running()
            or self._inside_entry
            or not (torch.is_grad_enabled() or self._count.evaluation_due)
        )

    def _observe_evaluation(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The first forward under no_grad after a step: an evaluation past the wrapper, in eval mode."""
        self._count.evaluated()
        if not module.training:
            for state in self._models.states_with(module):
                if (ddp := state.ddp()) is not None:
                    self._run.sites.use_buffers(ddp, "evaluated", state.contains)
        return original(*args, **kwargs)

    def _observe_forward(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A grad-enabled forward of a watched module, outside every wrapper's: a bypass if gradients follow."""
        if not torch.is_grad_enabled():
            return self._observe_evaluation(module, original, args, kwargs)
        if in_backward():
            return original(*args, **kwargs)
        states = self._models.states_with(module)
        if not states:
            return original(*args, **kwargs)
        state = states[-1]
        line, caller = find_call_frames(state.contains)
        entry = Entry(site_of(line, caller))
        self._contain(state.read_names, entry, line, caller)
        self._inside_entry = True
        try:
            outputs = original(*args, **kwargs)
        finally:
            self._inside_entry = False
        self._contain(state.enter, entry, outputs)
        return outputs

    # ---- windows --------------------------------------------------------------------------------------------

    def _sync_switched(self, ddp: nn.Module, value: bool) -> None:
        state = self._models.state_of(ddp)
        if state is None:
            return
        if not value:
            state.switch_off(find_call_site())
        elif (site := state.switch_on()) is not None:
            self._window_without_effect(site)


def _is_replicated(ddp: DistributedDataParallel) -> bool:
    """Say whether all ranks are meant to hold the same model after every step."""
    hooks = " ".join(type(state).__name__ for _, state in internals.COMM_HOOKS.of(ddp, ()))
    return "LocalSGD" not in hooks and dist.get_world_size(ddp.process_group) == dist.get_world_size()
