"""The hooks probe: which hooks were registered, and which of them fired."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpcall.evidence import HookCount
from ddpcall.taps import (
    HOOK_DICTS,
    count_forwards,
    count_global_hook,
    count_hook,
    count_registered_hooks,
)

GLOBAL = "global_"


@dataclass
class _Witness:
    module: nn.Module
    roles: tuple[str, ...]
    name: str
    kind: str
    fired: Tensor
    forwards: Tensor


class HooksObserver:
    """Counts for every module of a subject; read them with `evidence()` at any time."""

    def __init__(self) -> None:
        self._witnesses: list[_Witness] = []
        self._global_hooks = dict.fromkeys(HOOK_DICTS, 0)

    def watch_module(
        self, stack: ExitStack, module: nn.Module, roles: tuple[str, ...], name: str, device: torch.device
    ) -> dict[str, Tensor]:
        """Register one witness of each kind on a module, and count its forwards; return their counters by kind."""
        runs = {"forward": _counter(device), "full_backward": _counter(device)}
        runs["forward_pre"] = runs["forward"]
        stack.callback(count_forwards(module, runs["forward"], runs["full_backward"]))
        for kind in HOOK_DICTS:
            fired = _counter(device)
            stack.callback(count_hook(module, kind, fired))
            self._witnesses.append(_Witness(module, roles, name, kind, fired, runs[kind]))
        return runs

    def watch_globally(
        self,
        stack: ExitStack,
        watched: list[tuple[nn.Module, tuple[str, ...], str, dict[str, Tensor]]],
        device: torch.device,
    ) -> None:
        """Register one witness of each kind for all modules at once."""
        for kind in HOOK_DICTS:
            counters = {id(module): _counter(device) for module, *_ in watched}
            stack.callback(count_global_hook(kind, counters))
            for module, roles, name, runs in watched:
                fired = counters[id(module)]
                self._witnesses.append(_Witness(module, roles, name, GLOBAL + kind, fired, runs[kind]))

    def evidence(self) -> tuple[HookCount, ...]:
        """Return the counts so far, one record for each role, module and kind."""
        return tuple(
            HookCount(
                role=role,
                module=witness.name,
                kind=witness.kind,
                registered=_num_registered(witness),
                fired=int(witness.fired),
                forwards=int(witness.forwards),
            )
            for witness in self._witnesses
            for role in witness.roles
        )


@contextmanager
def observe_hooks(
    wrapped: nn.Module, inner: nn.Module, *, device: torch.device, global_hooks: bool = False
) -> Iterator[HooksObserver]:
    """Witness forward-pre, forward and full-backward hooks on the wrapped, the inner and its submodules.

    Args:
        wrapped: The object the training script holds.
        inner: The user's own module under it.
        device: Where the counters live, and the model: compiled graphs take them as inputs.
        global_hooks: Also register the three kinds for all modules (`register_module_forward_hook` …).

    Yields:
        The observer. "fired" stands beside "forwards": a hook that did not fire is evidence only where
        a forward ran; for backward hooks, one whose output required a gradient.

    Blind to: hooks registered by others that raise or return early before ours; modules between the wrapped
    and the inner one (DDP under torch.compile). Changes: a hooked module never takes torch's short cut around
    hooks, and a full-backward hook adds a node to the autograd graph.

    Source: `torch/nn/modules/module.py`, `_call_impl`.
    """
    observer = HooksObserver()
    with ExitStack() as stack:
        watched = []
        for module, roles, name in _roles(wrapped, inner):
            runs = observer.watch_module(stack, module, roles, name, device)
            watched.append((module, roles, name, runs))
        if global_hooks:
            observer.watch_globally(stack, watched, device)
        yield observer


def _roles(wrapped: nn.Module, inner: nn.Module) -> list[tuple[nn.Module, tuple[str, ...], str]]:
    roots: list[tuple[nn.Module, tuple[str, ...], str]]
    if wrapped is inner:
        roots = [(inner, ("wrapped", "inner"), "")]
    else:
        roots = [(wrapped, ("wrapped",), ""), (inner, ("inner",), "")]
    below = [(module, ("submodules",), name) for name, module in inner.named_modules() if module is not inner]
    return roots + below


def _num_registered(witness: _Witness) -> int:
    if witness.kind.startswith(GLOBAL):
        return 1
    return count_registered_hooks(witness.module, witness.kind)


def _counter(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=device)
