"""The hooks probe: which hooks were registered, and which of them fired."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpcall.evidence import HookCount
from ddpcall.probes.probe import Observer, Probe, Setting
from ddpcall.taps import (
    HOOK_DICTS,
    SpanLog,
    SpanPlace,
    count_forwards,
    count_global_hook,
    count_hook,
    count_registered_hooks,
)

GLOBAL = "global_"
# What torch says because of our own full-backward hooks, which turn inputs and outputs into views.
OUR_OWN_WARNINGS = (
    "Full backward hook is firing when gradients are computed",
    r"FSDP2-wrapped module \(.*\) returned a view",
)


@dataclass(frozen=True)
class _Watched:
    module: nn.Module
    roles: tuple[str, ...]
    name: str
    runs: dict[str, Tensor]


@dataclass(frozen=True)
class _CountingHook:
    watched: _Watched
    kind: str
    fired: Tensor
    runs: Tensor
    runs_before: int

    def count(self, role: str) -> HookCount:
        module = self.watched.module
        is_global = self.kind.startswith(GLOBAL)
        return HookCount(
            role=role,
            module=self.watched.name,
            kind=self.kind,
            registered=1 if is_global else count_registered_hooks(module, self.kind),
            fired=int(self.fired),
            forwards=int(self.runs) - self.runs_before,
        )


class HooksObserver(Observer):
    """Counts the forwards of every module of a subject from the start, and hooks once `register` was called.

    Attributes:
        late: Whether to register after the first step.
        leave_after: Steps after which the subject is left as it was; 0: never.
    """

    outlives_failure = True

    def __init__(
        self, watched: list[_Watched], stack: ExitStack, device: torch.device, global_hooks: bool
    ) -> None:
        self._watched = watched
        self._stack = stack
        self._device = device
        self._global_hooks = global_hooks
        self._counting_hooks: list[_CountingHook] = []
        self._final: tuple[HookCount, ...] | None = None
        self.late = False
        self.leave_after = 0

    def begin_step(self, step: int) -> None:
        """Register late hooks after the first step."""
        if self.late and step == 1:
            self.register()

    def end_step(self, step: int) -> None:
        """Leave when enough was seen."""
        if step + 1 == self.leave_after:
            self.retire()

    def register(self) -> None:
        """Register one counting hook of each kind on every module: the moment a user would register theirs."""
        for kind in HOOK_DICTS:
            for watched in self._watched:
                fired = _counter(self._device)
                self._stack.callback(count_hook(watched.module, kind, fired))
                self._add(watched, kind, kind, fired)
            if self._global_hooks:
                self._register_globally(kind)

    def _register_globally(self, kind: str) -> None:
        counters = {id(watched.module): _counter(self._device) for watched in self._watched}
        self._stack.callback(count_global_hook(kind, counters))
        for watched in self._watched:
            self._add(watched, GLOBAL + kind, kind, counters[id(watched.module)])

    def _add(self, watched: _Watched, name: str, kind: str, fired: Tensor) -> None:
        runs = watched.runs[kind]
        self._counting_hooks.append(_CountingHook(watched, name, fired, runs, int(runs)))

    def retire(self) -> None:
        """Take all hooks and counters off the subject; the counts stay as they are."""
        self._final = self.evidence()
        self._stack.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts so far."""
        return {
            "final": None if self._final is None else [dataclasses.asdict(count) for count in self._final],
            "runs": [{kind: int(runs) for kind, runs in watched.runs.items()} for watched in self._watched],
            "hooks": [(int(hook.fired), hook.runs_before) for hook in self._counting_hooks],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with counts of another process: registered, or retired, as the hooks were there."""
        if state["final"] is not None:
            self._final = tuple(HookCount(**values) for values in state["final"])
            self._stack.close()
            return
        if state["hooks"] and not self._counting_hooks:
            self.register()
        for watched, counts in zip(self._watched, state["runs"], strict=True):
            for kind, count in counts.items():
                watched.runs[kind].fill_(count)
        for index, (fired, runs_before) in enumerate(state["hooks"]):
            self._counting_hooks[index].fired.fill_(fired)
            self._counting_hooks[index] = dataclasses.replace(self._counting_hooks[index], runs_before=runs_before)

    def evidence(self) -> tuple[HookCount, ...]:
        """Return the counts so far, one record for each role, module and kind."""
        if self._final is not None:
            return self._final
        return tuple(hook.count(role) for hook in self._counting_hooks for role in hook.watched.roles)


@contextmanager
def observe_hooks(
    wrapped: nn.Module,
    inner: nn.Module,
    *,
    device: torch.device,
    global_hooks: bool = False,
    log: SpanLog | None = None,
) -> Generator[HooksObserver]:
    """Count calls of forward-pre, forward and full-backward hooks on wrapped, inner and submodules.

    Args:
        wrapped: The object the training script holds.
        inner: The user's own module under it.
        device: Where the counters live, and the model: compiled graphs take them as inputs.
        global_hooks: Also register the three kinds for all modules (`register_module_forward_hook` …).
        log: Gets a span for each forward outside compiled code, while it records.

    Yields:
        The observer; no hook is there before its `register()`. "fired" stands beside "forwards": a hook that
        did not fire is evidence only where a forward ran; for backward hooks, one whose output required a
        gradient. After its `retire()` the subject is as it was.

    Blind to: scripted modules, which refuse hooks and whose forward is not seen; hooks registered by others
    that raise or return early before ours; modules between the wrapped and the inner one (DDP under
    torch.compile); late hooks on the children of an nn.Sequential compiled in
    place, which fire without our forward counters and do not with them.

    Changes: a hooked module never takes torch's short cut around hooks, and a full-backward hook adds a node
    to the autograd graph. torch's warnings that a full-backward hook fires on inputs that need no gradient, and
    that FSDP2 met a view, are silenced meanwhile: our own hooks cause them.

    Source: `torch/nn/modules/module.py`, `_call_impl`.
    """
    with ExitStack() as stack, warnings.catch_warnings():
        for message in OUR_OWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        watched = []
        for module, roles, name in list_roles(wrapped, inner):
            runs = {"forward": _counter(device), "full_backward": _counter(device)}
            runs["forward_pre"] = runs["forward"]
            place = None if log is None else place_of(module, roles, name, log)
            stack.callback(count_forwards(module, runs["forward"], runs["full_backward"], place))
            watched.append(_Watched(module, roles, name, runs))
        yield HooksObserver(watched, stack, device, global_hooks)


@contextmanager
def _observe(setting: Setting) -> Generator[HooksObserver]:
    subject = setting.subject
    with observe_hooks(
        subject.wrapped,
        subject.inner,
        device=setting.device,
        global_hooks=setting.global_hooks,
        log=setting.log,
    ) as observer:
        observer.late = setting.late_hooks
        if setting.hook_steps and not setting.spec.compiles:  # leaving would compile again
            observer.leave_after = setting.hook_steps + setting.late_hooks
        if not observer.late:
            observer.register()
        yield observer


PROBE = Probe(name="hooks", observe=_observe)


def _takes_hooks(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule)


def place_of(module: nn.Module, roles: tuple[str, ...], name: str, log: SpanLog) -> SpanPlace:
    """Return what a module's spans are called: a root by its class, a module below it by its qualified name."""
    kind = type(module).__name__
    return SpanPlace(log, name or kind, roles[0].removesuffix("s"), kind if name else None)


def list_roles(wrapped: nn.Module, inner: nn.Module) -> list[tuple[nn.Module, tuple[str, ...], str]]:
    """List the wrapped, the inner and its submodules, each once: module, roles, qualified name below the inner."""
    roots: list[tuple[nn.Module, tuple[str, ...], str]]
    if wrapped is inner:
        roots = [(inner, ("wrapped", "inner"), "")]
    else:
        roots = [(wrapped, ("wrapped",), "")] if _takes_hooks(wrapped) else []
        roots += [(inner, ("inner",), "")]
    below = [(module, ("submodules",), name) for name, module in inner.named_modules() if module is not inner]
    return roots + below


def _counter(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=device)
