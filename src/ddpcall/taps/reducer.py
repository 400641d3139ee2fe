"""See whether DDP's reducer is armed, and gradients arrive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore[reportAttributeAccessIssue]

from ddpcall import torch_internals as internals
from ddpcall.taps.undo import Undo, wrap_method


@dataclass
class ReducerLog:
    """What the reducer tap saw since the last `take`.

    Attributes:
        armed: Whether a reducer now expects gradients.
        armings: Grad-enabled forwards that prepared the reducer.
        arrivals_armed: Gradients that arrived while it was armed.
        arrivals_unarmed: Gradients that arrived while it was not.
    """

    armed: bool = False
    armings: int = 0
    arrivals_armed: int = 0
    arrivals_unarmed: int = 0
    _disarm_queued: bool = field(default=False, repr=False)

    def take(self) -> tuple[int, int, int]:
        """Return (armings, arrivals armed, arrivals unarmed) and start counting anew; `armed` stays."""
        seen = (self.armings, self.arrivals_armed, self.arrivals_unarmed)
        self.armings = self.arrivals_armed = self.arrivals_unarmed = 0
        return seen

    def arm(self) -> None:
        """Note that a forward prepared the reducer."""
        self.armed = True
        self.armings += 1

    def arrive(self) -> None:
        """Note one gradient; the first armed one queues the disarming at the end of this backward."""
        if not self.armed:
            self.arrivals_unarmed += 1
            return
        self.arrivals_armed += 1
        if not self._disarm_queued:
            self._disarm_queued = True
            internals.EXECUTION_ENGINE.get().queue_callback(self._disarm)

    def _disarm(self) -> None:
        self.armed = self._disarm_queued = False


def tap_reducer(ddp: nn.Module, log: ReducerLog) -> Undo:
    """Arm `log` whenever this DDP prepares its reducer for a backward.

    Source: `torch/nn/parallel/distributed.py`, `_post_forward`: the reducer is prepared when gradients are
    enabled and `require_backward_grad_sync` is set.

    Blind to: DDP's python reducer and delayed all-reduce, which take other paths.
    """

    def arming(original: Callable[..., Any]) -> Callable[..., Any]:
        def _post_forward(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and ddp.require_backward_grad_sync:
                log.arm()
            return original(*args, **kwargs)

        return torch.compiler.disable(_post_forward)

    return wrap_method(ddp, internals.DDP_POST_FORWARD.name, arming)


def tap_lazy_reducer(replicate_state: Any, log: ReducerLog) -> Undo:
    """Put `tap_reducer` on the DDP that `replicate` creates in its first forward, as soon as it is there."""
    with ExitStack() as stack:
        undos = stack.pop_all()

    def tapping(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            undos.callback(tap_reducer(internals.REPLICATE_STATE_DDP.of(replicate_state), log))

        return init

    undos.callback(wrap_method(replicate_state, internals.REPLICATE_STATE_INIT.name, tapping))
    return undos.close


def is_lazy(tensor: Tensor) -> bool:
    """Say whether a tensor belongs to a lazy module and has no values yet."""
    return isinstance(tensor, UninitializedTensorMixin)


def tap_gradient_arrivals(parameters: Iterable[nn.Parameter], log: ReducerLog) -> Undo:
    """Tell `log` whenever a parameter's gradient was accumulated.

    Blind to: `torch.autograd.grad`, which accumulates nothing, parameters that do not require a gradient, and
    lazy ones that have no values yet.
    """

    def arrived(_: Tensor) -> None:
        log.arrive()

    tapped = [parameter for parameter in parameters if parameter.requires_grad and not is_lazy(parameter)]
    undos = [hook_arrival(parameter, arrived) for parameter in tapped]

    def undo() -> None:
        for take_off in undos:
            take_off()

    return undo


def hook_arrival(parameter: Tensor, hook: Callable[[Tensor], None]) -> Undo:
    """Call a hook with a parameter whenever a gradient has arrived there.

    The undo takes the hook off again, and the dict that torch made for it; it holds the parameter weakly.
    """
    handle: Any = parameter.register_post_accumulate_grad_hook(hook)
    reference = weakref.ref(parameter)

    def undo() -> None:
        handle.remove()
        hooked = reference()
        hooks = internals.POST_ACCUMULATE_GRAD_HOOKS
        if hooked is not None and not hooks.of(hooked):
            setattr(hooked, hooks.name, None)

    return undo
