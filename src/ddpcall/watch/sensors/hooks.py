"""Hooks that do not run: modules entered through `.forward`, and weights that only a hook keeps fresh."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ddpcall import torch_internals as internals
from ddpcall.taps import ForwardTap, Undo, came_through_call, find_call_site, replace_attribute
from ddpcall.watch.events import Event, EventKind

REGISTRATIONS = {
    "register_forward_pre_hook": "forward_pre",
    "register_forward_hook": "forward",
    "register_full_backward_pre_hook": "full_backward_pre",
    "register_full_backward_hook": "full_backward",
}
NORMS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
_DEEPEST = 40
_ROUNDING = 1e-5


class HookWatch:
    """Taps the forward of every module that gets a hook, and looks how it is entered.

    Blind to: hooks that torch itself registers (`is_users`).
    """

    def __init__(
        self,
        emit: Callable[[Event], None],
        step: Callable[[], int],
        keep: Callable[[Undo], None],
        registered: Callable[[nn.Module, str, Any], None],
    ) -> None:
        """Take where events go, the current step, where undos go, and who else wants to hear of hooks."""
        self._emit = emit
        self._step = step
        self._keep = keep
        self._registered = registered
        self._tapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._tap = ForwardTap(self._observe, lambda: came_through_call(sys._getframe(2)))

    def attach(self) -> Undo:
        """Hear of hooks as they are registered; returns the undo."""
        internals.require(*internals.CALLS.values(), *internals.HOOK_DICTS.values())
        with ExitStack() as stack:
            for name, kind in REGISTRATIONS.items():
                stack.callback(replace_attribute(nn.Module, name, self._hearing(getattr(nn.Module, name), kind)))
            return stack.pop_all().close

    def _hearing(self, register: Callable[..., Any], kind: str) -> Callable[..., Any]:
        @functools.wraps(register)
        def registering(module: nn.Module, hook: Any, *args: Any, **kwargs: Any) -> Any:
            handle = register(module, hook, *args, **kwargs)
            if not torch.compiler.is_compiling():
                self.hear(module, hook)
                self._registered(module, kind, hook)
            return handle

        return registering

    def hear(self, module: nn.Module, hook: Any) -> None:
        """Tap a module because of a hook that it has."""
        if is_users(hook) or isinstance(hook, NORMS):
            self.tap(module)

    def tap(self, module: nn.Module) -> None:
        """Tap a module, if it is not.

        Modules of compiled models are tapped before they get hooks: a tap put on together with a late hook would
        make dynamo recompile, and the hook fire that does not without the watch.
        """
        if module not in self._tapped and can_be_tapped(module):
            self._tapped.add(module)
            self._keep(self._tap.put(module))

    def _observe(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if module in self._tapped and not _is_called(module, sys._getframe(2)):
            for event in self._look_at(module):
                self._emit(event)
        return original(*args, **kwargs)

    def _look_at(self, module: nn.Module) -> Iterator[Event]:
        name = type(module).__name__
        for hook in internals.HOOK_DICTS["forward_pre"].of(module).values():
            if isinstance(hook, NORMS) and _is_stale(hook, module):
                facts = {"module": name, "hook": type(hook).__name__, "name": _weight_name(hook)}
                yield Event(
                    EventKind.STALE_WEIGHT, find_call_site(), self._step(), (_weight_name(hook),), (), facts
                )
        slots = internals.HOOK_DICTS.items()
        counts = {kind: sum(map(is_users, slot.of(module).values())) for kind, slot in slots}
        skipped = [f"{count} {kind} hook{'s' * (count != 1)}" for kind, count in counts.items() if count]
        if skipped:
            facts = {"module": name, "hooks": " and ".join(skipped)}
            yield Event(EventKind.HOOKS_SKIPPED, find_call_site(), self._step(), (), (), facts)


def can_be_tapped(module: nn.Module) -> bool:
    """Say whether a module's forward may be replaced on the instance: scripted ones refuse."""
    return not isinstance(module, torch.jit.ScriptModule)


def is_users(hook: Any) -> bool:
    """Say whether a hook is neither torch's own nor ours."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    owner = getattr(hook, "__module__", None) or type(hook).__module__
    return not (isinstance(hook, NORMS) or owner == "torch" or owner.startswith(("torch.", "ddpcall.")))


def _is_called(module: nn.Module, frame: FrameType | None) -> bool:
    """Say whether the nearest `Module.__call__` up the stack is this module's own.

    In between may stand functions that somebody put around forward, such as accelerate's autocast.
    """
    for _ in range(_DEEPEST):
        if frame is None:
            return False
        if came_through_call(frame):
            return frame.f_locals.get("self") is module
        frame = frame.f_back
    return False


def _weight_name(hook: Any) -> str:
    return getattr(hook, "name", None) or getattr(hook, "_tensor_name", "weight")


def _is_stale(hook: Any, module: nn.Module) -> bool:
    """Say whether the hook would have made another weight, or one that gradients can flow through.

    Of spectral_norm, what it would have made without its power iteration: that one changes its state.
    """
    if torch.is_grad_enabled():
        return True
    current = getattr(module, _weight_name(hook))
    with torch.no_grad():
        if isinstance(hook, WeightNorm):
            return not torch.equal(hook.compute_weight(module), current)
        if isinstance(hook, prune.BasePruningMethod):
            return not torch.equal(hook.apply_mask(module), current)
        fresh = hook.compute_weight(module, do_power_iteration=False)
        return bool((fresh - current).norm() > _ROUNDING * fresh.norm())
