"""Sharded models: gradients that never reach the shards, and crashes that a bypass caused.

fully_shard computes with whole parameters and reduces their gradients into the shards after the backward. A
gradient that still lies on a whole parameter when the optimizer steps was not reduced, and the step goes without
it: synchronisation was off, or the forward went past the hooks. Forwards past them only serve to name the line.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType, TracebackType
from typing import Any

import torch
from torch import nn

from ddpcall import torch_internals as internals
from ddpcall.taps import (
    NOWHERE,
    CallSite,
    ForwardTap,
    Undo,
    came_through_call,
    find_call_frames_among,
    find_call_site,
    in_backward,
    replace_attribute,
    site_of,
)
from ddpcall.watch.events import Event, EventKind
from ddpcall.watch.output.watched import WatchedModel
from ddpcall.watch.sensors.hooks import can_be_tapped

_MIXED = "mixed torch.Tensor and DTensor"
FULLY_SHARD = internals.FSDP_MODULE.owner_path
_FULLY_SHARDING = "torch.distributed.fsdp."
_SHARDING = ("torch.distributed.fsdp", internals.COMPOSABLE.path, "torch.distributed.tensor")


class ShardedWatch:
    """Watches modules that fully_shard and parallelize_module hook.

    Attributes:
        num_steps: Steps of an optimizer that has sharded parameters.

    Blind to: crashes that the script catches; FSDP1; weights used without any module's forward.
    """

    def __init__(self, keep: Callable[[Undo], None] = lambda undo: None) -> None:
        """Take where undos go; start with no sharded module."""
        self._keep = keep
        self.num_steps = 0
        self._seen: dict[int, tuple[str, str]] = {}
        self._hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._tapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._switched: weakref.WeakKeyDictionary[Any, CallSite] = weakref.WeakKeyDictionary()
        self._entries: dict[CallSite, nn.Module] = {}
        self._tap = ForwardTap(self._observe, self._is_quiet)

    def attach(self, fully_shard: ModuleType) -> Undo:
        """Hear where synchronisation is switched off; returns the undo."""
        internals.require(*internals.TO_WATCH_SHARDS)
        switch = fully_shard.FSDPModule.set_requires_gradient_sync

        @functools.wraps(switch)
        def set_requires_gradient_sync(module: Any, requires_gradient_sync: bool, **kwargs: Any) -> None:
            switch(module, requires_gradient_sync, **kwargs)
            if not requires_gradient_sync:
                site = find_call_site()
                self._switched.update((group, site) for group in _groups_below(module) if not group.reduce_grads)

        return replace_attribute(fully_shard.FSDPModule, "set_requires_gradient_sync", set_requires_gradient_sync)

    def hook_registered(self, module: nn.Module, kind: str, hook: Any) -> None:
        """Remember a module that torch's sharding puts a pre-forward hook on."""
        owner = getattr(hook, "__module__", None) or ""
        if kind != "forward_pre" or not owner.startswith(_SHARDING):
            return
        self._hooked.add(module)
        name = type(module).__name__.removeprefix("FSDP")
        if owner.startswith("torch.distributed.tensor"):
            self._seen.setdefault(0, (name, "tp"))  # one, of however many layers
        if owner.startswith(_FULLY_SHARDING):
            below = set(module.modules())
            for inner in below:
                self._seen.pop(id(inner), None)
            self._seen[id(module)] = (name, "fsdp2")
            self._roots.difference_update(below)
            self._roots.add(module)
            for inner in below - set(self._tapped):
                if can_be_tapped(inner):
                    self._tapped.add(inner)
                    self._keep(self._tap.put(inner))

    def watched_models(self) -> list[WatchedModel]:
        """Return the sharded models that were seen, also those that are gone."""
        return [WatchedModel(name, wrapper, self.num_steps) for name, wrapper in self._seen.values()]

    def roots(self) -> list[nn.Module]:
        """Return the modules that fully_shard was called on last."""
        return list(self._roots)

    # ---- gradients that never reach the shards -----------------------------------------------------------------

    def _is_quiet(self) -> bool:
        return not torch.is_grad_enabled() or any(map(_is_running, self._roots))

    def _observe(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A forward outside the hooks of every sharded root: harm if its gradients stay where they are."""
        if not in_backward() and not _is_running(module):
            self._entries.setdefault(find_call_site(self._contains), module)
        return original(*args, **kwargs)

    def _contains(self, candidate: Any) -> bool:
        return isinstance(candidate, nn.Module) and candidate in self._tapped

    def before_step(self, step: int, is_stepped: Callable[[int], bool]) -> Iterator[Event]:
        """Yield what the coming optimizer step goes without.

        Args:
            step: Its number.
            is_stepped: Says of a parameter's id whether this optimizer has it.
        """
        entries, self._entries = self._entries, {}
        groups = [group for root in self._roots for group in _groups_below(root)]
        off = [group for group in groups if not group.reduce_grads]
        if not off and not entries:
            return
        for kind, its_groups, sites in (
            (EventKind.SHARDED_SYNC_OFF, off, [self._switched.get(group, NOWHERE) for group in off]),
            (EventKind.SHARDED_UNREDUCED, [group for group in groups if group.reduce_grads], list(entries)),
        ):
            names = tuple(name for group in its_groups for name in _unreduced(group, is_stepped))
            if names and sites:
                model = type(entries[sites[0]] if sites[0] in entries else next(iter(self._roots))).__name__
                yield Event(kind, sites[0], step, names, tuple(sites[1:]), {"model": model.removeprefix("FSDP")})

    # ---- crashes -----------------------------------------------------------------------------------------------

    def explain(self, error: BaseException, step: int) -> Event | None:
        """Return the event that caused a crash, None where no bypass did.

        The crash is a bypass's when the module that met a shard lies below a sharded module whose `__call__`, and
        with it the hook that gathers the parameters, is not on the stack.
        """
        if _MIXED not in str(error) or not self._hooked:
            return None
        frames = _frames_of(error.__traceback__)
        modules = [self_ for frame in frames if isinstance(self_ := frame.f_locals.get("self"), nn.Module)]
        gatherer = self._gatherer(modules[-1]) if modules else self._anyone()
        if gatherer is None or any(_gathers(frame, gatherer) for frame in frames):
            return None
        below = {id(module) for module in gatherer.modules()}
        site = site_of(*find_call_frames_among(frames[::-1], lambda candidate: id(candidate) in below))
        message = str(error).splitlines()[0]
        facts = {"module": type(gatherer).__name__, "error": message[:200]}
        return Event(EventKind.SHARDED_BYPASSED, site, step, (), (), facts)

    def _gatherer(self, module: nn.Module) -> nn.Module | None:
        """Return the nearest sharded module that holds another: the one with the fewest modules below."""
        holders = [hooked for hooked in self._hooked if any(child is module for child in hooked.modules())]
        return min(holders, key=lambda holder: sum(1 for _ in holder.modules()), default=None)

    def _anyone(self) -> nn.Module | None:
        return next(iter(self._hooked), None)


def _frames_of(trace: TracebackType | None) -> list[FrameType]:
    """Return the frames of a traceback, outermost first."""
    frames = []
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    return frames


def _gathers(frame: FrameType, gatherer: nn.Module) -> bool:
    if "torch/distributed/fsdp" in frame.f_code.co_filename:  # register_fsdp_forward_method's wrapper
        return True
    return came_through_call(frame) and frame.f_locals.get("self") is gatherer


def _state_of(module: nn.Module) -> Any:
    """Return the state fully_shard keeps of a module, None where it keeps none."""
    get_state = internals.GET_FSDP_STATE.of(module, None)
    return None if get_state is None else get_state()


def _is_running(module: nn.Module) -> bool:
    """Say whether a sharded module is between its own forward or backward hooks."""
    state = _state_of(module)
    return state is not None and internals.FSDP_TRAINING_STATE.of(state).name != "IDLE"


def _groups_below(root: nn.Module) -> list[Any]:
    """Return the parameter groups of a sharded module and those below it.

    Before torch 2.13 a state has one group or none; from then on a list.
    """
    states = [state for module in root.modules() if (state := _state_of(module)) is not None]
    groups = [
        internals.FSDP_PARAM_GROUPS.of(state, None) or [internals.FSDP_PARAM_GROUP.of(state)] for state in states
    ]
    return [group for its_groups in groups for group in its_groups if group is not None]


def _unreduced(group: Any, is_stepped: Callable[[int], bool]) -> list[str]:
    """Return the parameters of a group whose gradients lie on the whole parameter still."""
    return [
        internals.FSDP_PARAM_FQN.of(parameter) or internals.FSDP_MODULE_INFO.of(parameter).param_name
        for parameter in group.fsdp_params
        if is_stepped(id(parameter.sharded_param))
        and (
            parameter.unsharded_accumulated_grad is not None
            or getattr(internals.FSDP_UNSHARDED_PARAM.of(parameter, None), "grad", None) is not None
        )
    ]
