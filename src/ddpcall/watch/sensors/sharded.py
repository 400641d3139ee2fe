"""Modules that fully_shard and parallelize_module hook, the forwards past their hooks, and their gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ddpcall import torch_internals as internals
from ddpcall.taps import (
    NOWHERE,
    CallSite,
    ForwardTap,
    Undo,
    find_call_site,
    hear_calls,
    in_backward,
)
from ddpcall.watch.output.watched import WatchedModel
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.hooks import can_be_tapped

_NEEDED = (
    internals.GET_FSDP_STATE,
    internals.FSDP_TRAINING_STATE,
    internals.FSDP_PARAM_GROUP,
    internals.FSDP_PARAM_FQN,
    internals.FSDP_MODULE_INFO,
    *internals.FSDP_PARTS.values(),
)


FULLY_SHARD = internals.FSDP_MODULE.owner_path
_FULLY_SHARDING = "torch.distributed.fsdp."
_SHARDING = ("torch.distributed.fsdp", internals.COMPOSABLE.path, "torch.distributed.tensor")


class ShardedSensor:
    """Watches modules that fully_shard and parallelize_module hook.

    Attributes:
        num_steps: Steps of an optimizer that has sharded parameters.

    Blind to: FSDP1; weights used without any module's forward.
    """

    def __init__(self, run: Run) -> None:
        """Take the run, which keeps undos; start with no sharded module."""
        self._keep = run.keep
        self.num_steps = 0
        self._seen: dict[int, tuple[str, str]] = {}
        self._hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._tapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._switched: weakref.WeakKeyDictionary[Any, CallSite] = weakref.WeakKeyDictionary()
        self._entries: dict[CallSite, nn.Module] = {}
        self._tap = ForwardTap(self._observe, self._is_quiet)

    def attach(self, fully_shard: ModuleType) -> Undo:
        """Hear where synchronization is switched off; returns the undo."""
        internals.require(*_NEEDED)
        return hear_calls(fully_shard.FSDPModule, "set_requires_gradient_sync", after=self._note_switch)

    def _note_switch(self, _: None, module: Any, requires_gradient_sync: bool, **kwargs: Any) -> None:
        if not requires_gradient_sync:
            site = find_call_site()
            self._switched.update((group, site) for group in _groups_below(module) if not group.reduce_grads)

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

    def take_entries(self) -> dict[CallSite, nn.Module]:
        """Return the forwards past the hooks since this was last asked: the module by line."""
        entries, self._entries = self._entries, {}
        return entries

    def groups(self) -> list[Any]:
        """Return the parameter groups of all sharded modules."""
        return [group for root in self._roots for group in _groups_below(root)]

    def switched_at(self, group: Any) -> CallSite:
        """Return where a group's synchronization was switched off."""
        return self._switched.get(group, NOWHERE)

    def name(self, module: nn.Module | None = None) -> str:
        """Return a sharded module's own class, or that of any root."""
        found = next(iter(self._roots)) if module is None else module
        return type(found).__name__.removeprefix("FSDP")

    def has_hooked(self) -> bool:
        """Say whether torch's sharding has hooked any module."""
        return bool(self._hooked)

    def find_gatherer(self, module: nn.Module | None) -> nn.Module | None:
        """Return the nearest sharded module that holds another: the one with the fewest modules below.

        Args:
            module: None for any sharded module.
        """
        if module is None:
            return next(iter(self._hooked), None)
        holders = [hooked for hooked in self._hooked if any(child is module for child in hooked.modules())]
        return min(holders, key=lambda holder: sum(1 for _ in holder.modules()), default=None)


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


def find_unreduced(group: Any, is_stepped: Callable[[int], bool]) -> list[str]:
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
