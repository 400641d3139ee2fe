"""DC301 and DC305: hooks that did not run, and weights that only a hook keeps fresh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.weight_norm import WeightNorm

from ddpcall import torch_internals as internals
from ddpcall.taps import Undo, find_call_site
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.hooks import NORMS, HookSensor, is_users

_ROUNDING = 1e-5


class HooksRule(Rule):
    """A module that was entered through `.forward` ran without its hooks.

    Blind to: hooks that torch itself registers (`is_users`).
    """

    part = "hooks of modules"

    def __init__(self, run: Run, registered: Callable[[nn.Module, str, Any], None]) -> None:
        """Take the run, and what else hears of every hook: its module, its kind, and itself."""
        super().__init__(run)
        self.sensor = HookSensor(run, registered, self.entered_past_call)

    def attach(self) -> Undo:
        """Attach its sensor; returns the undo."""
        return self.sensor.attach()

    def entered_past_call(self, module: nn.Module) -> None:
        """Report what did not run on a module that was entered past its `__call__`."""
        name = type(module).__name__
        for hook in internals.HOOK_DICTS["forward_pre"].of(module).values():
            if isinstance(hook, NORMS) and _is_stale(hook, module):
                weight = _weight_name(hook)
                message = (
                    f"{name} was entered through .forward here: {type(hook).__name__} did not recompute its "
                    f"{weight}, and a stale one was used."
                )
                self.report("DC305", "stale_weight", find_call_site(), message, parameters=(weight,))
        slots = internals.HOOK_DICTS.items()
        counts = {kind: sum(map(is_users, slot.of(module).values())) for kind, slot in slots}
        skipped = [f"{count} {kind} hook{'s' * (count != 1)}" for kind, count in counts.items() if count]
        if skipped:
            message = (
                f"{name} has {' and '.join(skipped)} and was entered through .forward here: none of them ran."
            )
            self.report("DC301", "hooks_skipped", find_call_site(), message)


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
