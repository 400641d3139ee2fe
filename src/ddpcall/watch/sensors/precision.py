"""Mixed precision that accelerate put around a model's forward, and the calls that miss it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ddpcall.taps import CallSite, ForwardTap, Undo, find_call_site, hear_calls, in_backward
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.hooks import can_be_tapped


class PrecisionSensor:
    """Follows `Accelerator.prepare`: a submodule entered with gradients on, outside autocast, lost its precision.

    Blind to: other libraries' autocast; parameters that are used without a forward.

    Source: accelerate/accelerator.py, `prepare_model`: autocast is put on `model.forward`.
    """

    def __init__(self, run: Run, lost: Callable[[nn.Module, str, CallSite], None]) -> None:
        self._keep = run.keep
        self._lost = lost
        self._roots: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], str]] = (
            weakref.WeakKeyDictionary()
        )
        self._busy = False
        self._tap = ForwardTap(self._observe, lambda: self._busy or not torch.is_grad_enabled())

    def attach(self, accelerator: ModuleType) -> Undo:
        """Hear of models as they are prepared; returns the undo."""
        return hear_calls(accelerator.Accelerator, "prepare_model", after=self._prepared)

    def _prepared(self, prepared: Any, accelerator: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._adopt(model, accelerator.mixed_precision)

    def adopt(self, accelerator: Any) -> None:
        """Follow what an Accelerator prepared before the watch began."""
        for prepared in accelerator._models:
            for module in prepared.modules():
                self._adopt(module, accelerator.mixed_precision)

    def _adopt(self, root: nn.Module, precision: str) -> None:
        if precision not in ("fp16", "bf16") or not hasattr(root, "_original_forward"):
            return
        for module in root.modules():
            if can_be_tapped(module) and module not in self._roots:
                self._roots[module] = (weakref.ref(root), precision)
                self._keep(self._tap.put(module))

    def _observe(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The outermost entry: the prepared model itself brings its autocast along, a submodule does not."""
        reference, precision = self._roots.get(module, (None, ""))
        root = None if reference is None else reference()
        if root is None or in_backward():
            return original(*args, **kwargs)
        if module is not root and not torch.is_autocast_enabled(_device_type(root)):
            site = find_call_site(lambda candidate: self._belongs(candidate, root))
            self._lost(root, precision, site)
        self._busy = True
        try:
            return original(*args, **kwargs)
        finally:
            self._busy = False

    def _belongs(self, candidate: Any, root: nn.Module) -> bool:
        entry = self._roots.get(candidate) if isinstance(candidate, nn.Module) else None
        return entry is not None and entry[0]() is root


def _device_type(root: nn.Module) -> str:
    parameter = next(root.parameters(), None)
    return "cpu" if parameter is None else parameter.device.type
