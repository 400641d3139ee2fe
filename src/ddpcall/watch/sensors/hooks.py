"""Hooks that do not run: modules entered through `.forward`, and weights that only a hook keeps fresh."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ddpcall import torch_internals as internals
from ddpcall.taps import ForwardTap, Undo, came_through_call, hear_calls, undo_all
from ddpcall.watch.run import Run

REGISTRATIONS = {
    "register_forward_pre_hook": "forward_pre",
    "register_forward_hook": "forward",
    "register_full_backward_pre_hook": "full_backward_pre",
    "register_full_backward_hook": "full_backward",
}
NORMS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
_DEEPEST = 40


class HookSensor:
    """Taps the forward of every module that gets a hook, and looks how it is entered.

    Blind to: hooks that torch itself registers (`is_users`).
    """

    def __init__(
        self,
        run: Run,
        registered: Callable[[nn.Module, str, Any], None],
        entered_past_call: Callable[[nn.Module], None],
    ) -> None:
        """Take the run.

        Args:
            run: Keeps the undos.
            registered: Hears of every hook: its module, its kind, and itself.
            entered_past_call: Hears of a module with hooks whose forward was called without them.
        """
        self._keep = run.keep
        self._registered = registered
        self._entered_past_call = entered_past_call
        self._tapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._tap = ForwardTap(self._observe, lambda: came_through_call(sys._getframe(2)))  # pyright: ignore[reportPrivateUsage]

    def attach(self) -> Undo:
        """Hear of hooks as they are registered; returns the undo."""
        internals.require(*internals.CALLS.values(), *internals.HOOK_DICTS.values())
        return undo_all(
            hear_calls(nn.Module, name, after=partial(self._was_registered, kind))
            for name, kind in REGISTRATIONS.items()
        )

    def _was_registered(
        self, kind: str, handle: Any, module: nn.Module, hook: Any, *args: Any, **kwargs: Any
    ) -> None:
        self.hear(module, hook)
        self._registered(module, kind, hook)

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
        if module in self._tapped and not _is_called(module, sys._getframe(2)):  # pyright: ignore[reportPrivateUsage]
            self._entered_past_call(module)
        return original(*args, **kwargs)


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
