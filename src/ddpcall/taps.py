"""Reversible instrumentation: the only room that touches a subject.

Every tap returns its undo, a callable that puts back exactly what was there, in any order and also after an
exception. Probes and watch are built on these and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore[reportAttributeAccessIssue]

Undo = Callable[[], None]

HOOK_DICTS = {
    "forward_pre": "_forward_pre_hooks",
    "forward": "_forward_hooks",
    "full_backward": "_backward_hooks",
}


def wrap_method(owner: Any, name: str, wrapping: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Undo:
    """Replace a method on one instance by `wrapping(original)`.

    Args:
        owner: The instance; its class is left alone.
        name: The method's name.
        wrapping: Gets the bound original, returns the callable to put in its place.

    Returns:
        The undo: restores the instance's `__dict__` entry, or its absence.

    Blind to: calls through the class, such as `type(m).forward(m, x)`.
    """
    had_own = name in owner.__dict__
    original = owner.__dict__[name] if had_own else partial(_call_class_method, owner, name)
    owner.__dict__[name] = wrapping(original)

    def undo() -> None:
        if had_own:
            owner.__dict__[name] = original
        else:
            owner.__dict__.pop(name, None)

    return undo


def _call_class_method(owner: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Look the method up when it is called: lazy modules change their class in their first forward."""
    try:
        method = getattr(type(owner), name)
    except AttributeError:  # TorchScript's modules have their methods in __getattr__
        return owner.__getattr__(name)(*args, **kwargs)
    return method(owner, *args, **kwargs)


def count_forwards(module: nn.Module, counter: Tensor, differentiable: Tensor) -> Undo:
    """Count the runs of a module's forward, however it was reached, and those a gradient can flow back through.

    The counters are tensors, so that compiled code counts too: dynamo traces the addition into the graph
    instead of guarding on a Python number, and nothing is recompiled.

    Args:
        module: The module to observe.
        counter: Shape (), integer, on any device: one more for every run.
        differentiable: The same, for runs whose output requires a gradient: only those have a backward.

    Blind to: `type(module).forward(module, x)` and the functional form on the module's weights.
    """

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs = original(*args, **kwargs)
            counter.add_(1)
            if requires_gradient(outputs):
                differentiable.add_(1)
            return outputs

        return forward

    return wrap_method(module, "forward", counting)


def requires_gradient(outputs: Any) -> bool:
    """Say whether any tensor in nested tuples, lists and dicts requires a gradient."""
    if isinstance(outputs, Tensor):
        return outputs.requires_grad
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    return isinstance(outputs, tuple | list) and any(requires_gradient(output) for output in outputs)


def count_hook(module: nn.Module, kind: str, counter: Tensor) -> Undo:
    """Register a witness hook that adds one to `counter` each time it fires.

    Args:
        module: Where to register.
        kind: forward_pre, forward or full_backward.
        counter: Shape (), integer.
    """

    def witness(*_: Any) -> None:
        counter.add_(1)

    register = {
        "forward_pre": module.register_forward_pre_hook,
        "forward": module.register_forward_hook,
        "full_backward": module.register_full_backward_hook,
    }[kind]
    # A compiled module writes this flag through to the module it holds, and keeps its own.
    flag_owner = getattr(module, "_orig_mod", module)
    had_full = flag_owner._is_full_backward_hook
    handle: Any = register(witness)

    def undo() -> None:
        handle.remove()
        flag_owner._is_full_backward_hook = had_full

    return undo


def count_global_hook(kind: str, counters: dict[int, Tensor]) -> Undo:
    """Register a witness hook for every module, counting those in `counters`, keyed by `id(module)`."""

    def witness(module: nn.Module, *_: Any) -> None:
        counter = counters.get(id(module))
        if counter is not None:
            counter.add_(1)

    hooks = nn.modules.module
    register: Any = {
        "forward_pre": hooks.register_module_forward_pre_hook,
        "forward": hooks.register_module_forward_hook,
        "full_backward": hooks.register_module_full_backward_hook,
    }[kind]
    had_full = hooks._global_is_full_backward_hook
    handle = register(witness)

    def undo() -> None:
        handle.remove()
        hooks._global_is_full_backward_hook = had_full

    return undo


def count_registered_hooks(module: nn.Module, kind: str) -> int:
    """Return how many hooks of one kind a module carries."""
    return len(getattr(module, HOOK_DICTS[kind]))


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
            torch.autograd.Variable._execution_engine.queue_callback(self._disarm)

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

    return wrap_method(ddp, "_post_forward", arming)


def tap_lazy_reducer(replicate_state: Any, log: ReducerLog) -> Undo:
    """Put `tap_reducer` on the DDP that `replicate` creates in its first forward, as soon as it is there."""
    with ExitStack() as stack:
        undos = stack.pop_all()

    def tapping(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            undos.callback(tap_reducer(replicate_state._ddp, log))

        return init

    undos.callback(wrap_method(replicate_state, "init", tapping))
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
    handles = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in tapped]

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for parameter in tapped:
            if not parameter._post_accumulate_grad_hooks:
                setattr(parameter, "_post_accumulate_grad_hooks", None)  # noqa: B010 (typed as a dict, None at first)

    return undo
