"""What all probes have in common: what an observer is told of a trial, and what a trial is told of a probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ddpcall.paths import Batch
from ddpcall.taps import SpanLog
from ddpcall.wrappers import CompileBackend, Subject, WrapperSpec


class Observer:
    """Observes one trial on one rank. A trial tells it of each step, in this order; it overrides what it needs.

    Attributes:
        kept: Names of the attributes that hold what was counted so far: lists, dicts, numbers, text and tensors.
        outlives_failure: Whether its evidence needs no other rank, and is taken from a trial that raised too.
    """

    kept: ClassVar[tuple[str, ...]] = ()
    outlives_failure: ClassVar[bool] = False

    def begin_step(self, step: int) -> None:
        """Hear that a step begins."""

    def time_step(self, step: int) -> AbstractContextManager[None]:
        """Return a context for what the script itself does in a step."""
        return nullcontext()

    def span(self, kind: str) -> AbstractContextManager[None]:
        """Return a context for a part of it: backward or optimizer."""
        return nullcontext()

    def note_result(self, outputs: Tensor) -> None:
        """See what the call path handed to the loss."""

    def end_backward(self, batch: Batch | None) -> None:
        """Look at the gradients, before the optimizer steps; None where this rank had no batch."""

    def end_step(self, step: int) -> None:
        """Look at what the optimizer did."""

    def evidence(self) -> Any:
        """Return this rank's part of the evidence. May be a collective: every rank calls it."""

    def columns(self, evidence: Any) -> dict[str, Sequence[float | None]]:
        """Return what `steps.jsonl` has of it: name to a value for each step. May be a collective."""
        return {}

    def flush(self) -> None:
        """Finish what was only begun. May be a collective: every rank must call it after the same step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted so far, for a checkpoint. May be a collective, as `flush` is."""
        self.flush()
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what another process had counted."""
        for name in self.kept:
            setattr(self, name, state[name])


@dataclass(kw_only=True)
class Setting:
    """The trial that probes are about to observe.

    Attributes:
        spec: The wrapper.
        device: Where the model lives.
        steps: Steps of the trial.
        log: Where spans of the timeline go.
        group: A gloo process group of the probes' own; None for a world of one rank.
        example: Inputs on the device, the same on every rank, for a comparison of outputs at the end.
        late_hooks: Whether hooks are registered after the first step.
        hook_steps: Steps after which the hooks probe leaves; 0: never.
        global_hooks: Whether to register hooks for all modules at once too.
        compile_backend: What to give torch.compile; a probe may put itself in between.
        observers: Those that observe already, by the names of their probes.
        subject: The wrapped model; not there yet for probes that come before it.
        optimizer: Its optimizer, likewise.
        sharded: Names of the parameters of which each rank holds another part, likewise.
    """

    spec: WrapperSpec
    device: torch.device
    steps: int
    log: SpanLog
    group: dist.ProcessGroup | None
    example: Tensor
    late_hooks: bool
    hook_steps: int
    global_hooks: bool
    compile_backend: CompileBackend
    observers: dict[str, Observer] = field(default_factory=dict)
    subject: Subject = field(init=False)
    optimizer: Optimizer = field(init=False)
    sharded: frozenset[str] = field(init=False)


def _take_rank_0(parts: Sequence[Any], num_steps: int) -> Any:
    return parts[0]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A kind of observer.

    Attributes:
        name: Its part of the evidence, and its switch among the configuration's `probes`, where it has one.
        observe: Begins to observe; None where there is nothing for it to see.
        before_wrapping: Whether it must be there when the model is wrapped.
        merge: Makes the trial's part of the evidence from those of all ranks, None where a rank has none, and the
            number of steps. What compares ranks was measured on all of them: then any rank's will do.
    """

    name: str
    observe: Callable[[Setting], AbstractContextManager[Observer] | None]
    before_wrapping: bool = False
    merge: Callable[[Sequence[Any], int], Any] = _take_rank_0
