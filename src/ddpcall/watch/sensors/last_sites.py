"""The lines where this rank last did what can make replicas differ. Harm is seen later."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ddpcall.taps import NOWHERE, CallSite, Undo, find_call_site, replace_attribute, undo_all


@dataclass(frozen=True)
class BufferUse:
    """The model was evaluated or saved on this rank, past the wrapper.

    Attributes:
        site: The user's line.
        step: Optimizer steps done by then.
        use: `evaluated` or `saved`.
    """

    site: CallSite
    step: int
    use: str


class LastSites:
    """Call sites by what was done, on wrapped models alone.

    Attributes:
        loads: (times, last line) of `load_state_dict` after wrapping.
        modes: Last line that switched to train (True) or eval (False).
        optimizers: Line that made an optimizer.
        additions: Last line that handed an optimizer more parameters.
        schedulers: Last line that stepped a scheduler, by optimizer.
        scalers: The GradScaler that last unscaled an optimizer's gradients or stepped it.
        scaler_loads: (times, last line) of a GradScaler's `load_state_dict`.
        buffer_uses: Evaluations and checkpoints since they were last taken.
        has_evaluated: Whether there ever was such an evaluation.
    """

    _MAX_EARLY = 10_000

    def __init__(
        self, is_watched: Callable[[nn.Module], bool], may_use_buffers: Callable[[nn.Module], int | None]
    ) -> None:
        """Take two questions to the attachment.

        Args:
            is_watched: Whether a module is a wrapper or belongs to one.
            may_use_buffers: Steps done, if evaluating or saving this module now means rank-local buffers.
        """
        self._is_watched = is_watched
        self._may_use_buffers = may_use_buffers
        self._depth = 0
        self.loads: tuple[int, CallSite] = (0, NOWHERE)
        self.modes: dict[bool, CallSite] = {}
        self.optimizers: weakref.WeakKeyDictionary[Optimizer, CallSite] = weakref.WeakKeyDictionary()
        self.additions: weakref.WeakKeyDictionary[Optimizer, CallSite] = weakref.WeakKeyDictionary()
        self.schedulers: weakref.WeakKeyDictionary[Optimizer, CallSite] = weakref.WeakKeyDictionary()
        self.scalers: weakref.WeakKeyDictionary[Optimizer, GradScaler] = weakref.WeakKeyDictionary()
        self.scaler_loads: tuple[int, CallSite] = (0, NOWHERE)
        self.buffer_uses: list[BufferUse] = []
        self.has_evaluated = False
        self._early_eval: weakref.WeakKeyDictionary[nn.Module, CallSite] = weakref.WeakKeyDictionary()

    def adopt(self, root: nn.Module) -> None:
        """Take over what was done to a model's modules before it was wrapped."""
        sites = [self._early_eval[module] for module in root.modules() if module in self._early_eval]
        if sites and False not in self.modes and not all(module.training for module in root.modules()):
            self.modes[False] = sites[-1]

    def made(self, optimizer: Optimizer) -> CallSite:
        """Return the line that handed an optimizer parameters last."""
        return self.additions.get(optimizer) or self.optimizers.get(optimizer, NOWHERE)

    def attach(self, optimizer_made: Callable[[Optimizer], None]) -> Undo:
        """Follow from now on; returns the undo.

        Args:
            optimizer_made: Hears of optimizers, before they have parameters.
        """
        self._optimizer_made = optimizer_made
        followed = (
            (nn.Module, "load_state_dict", self._note_load),
            (nn.Module, "train", self._note_mode),
            (Optimizer, "__init__", self._note_optimizer),
            (Optimizer, "add_param_group", self._note_addition),
            (LRScheduler, "step", self._note_scheduler),
            (ReduceLROnPlateau, "step", self._note_scheduler),
            (GradScaler, "step", self._note_scaler),
            (GradScaler, "unscale_", self._note_scaler),
            (GradScaler, "load_state_dict", self._note_scaler_load),
        )
        return undo_all(
            replace_attribute(owner, name, self._noting(getattr(owner, name), note))
            for owner, name, note in followed
        )

    def _noting(self, original: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        @functools.wraps(original)
        def noting(self_: Any, *args: Any, **kwargs: Any) -> Any:
            if self._depth or torch.compiler.is_compiling():  # a module's children are no news
                return original(self_, *args, **kwargs)
            self._depth += 1
            try:
                note(self_, *args, **kwargs)
                return original(self_, *args, **kwargs)
            finally:
                self._depth -= 1

        return noting

    def _note_load(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if self._is_watched(module):
            self.loads = (self.loads[0] + 1, find_call_site())

    def _note_mode(self, module: nn.Module, mode: bool = True) -> None:
        if self._is_watched(module):
            self.modes[mode] = find_call_site()
        elif not mode and len(self._early_eval) < self._MAX_EARLY:
            self._early_eval[module] = find_call_site()

    def use_buffers(self, module: nn.Module, use: str, inside: Callable[[Any], bool] | None = None) -> None:
        """Note that a module is evaluated or saved, if its buffers may differ between ranks now."""
        step = self._may_use_buffers(module)
        self.has_evaluated |= step is not None and use == "evaluated"
        if step is not None and not any(known.step == step and known.use == use for known in self.buffer_uses):
            self.buffer_uses = [*self.buffer_uses[-15:], BufferUse(find_call_site(inside), step, use)]

    def _note_optimizer(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        self._optimizer_made(optimizer)
        self.optimizers[optimizer] = find_call_site(lambda candidate: candidate is optimizer)

    def _note_addition(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        self.additions[optimizer] = find_call_site()

    def _note_scheduler(self, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        optimizer = getattr(scheduler, "optimizer", None)
        if isinstance(optimizer, Optimizer):
            self.schedulers[optimizer] = find_call_site()

    def _note_scaler(self, scaler: GradScaler, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(optimizer, Optimizer):
            self.scalers[optimizer] = scaler

    def _note_scaler_load(self, scaler: GradScaler, *args: Any, **kwargs: Any) -> None:
        self.scaler_loads = (self.scaler_loads[0] + 1, find_call_site())
