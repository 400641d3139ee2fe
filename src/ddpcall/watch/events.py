"""What a watched run is seen to do: events with the user's line. Facts; `diagnose` makes findings of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from ddpcall.taps import NOWHERE, CallSite


class EventKind(StrEnum):
    """What happened. The first group was seen to reach an optimizer step of more than one rank."""

    BYPASSED = "bypassed"
    """Gradients of a forward outside the wrapper's arrived while its reducer was not armed."""
    RAW_WEIGHTS = "raw_weights"
    """The same, without any forward: the weights were used directly."""
    IN_FORWARD = "in_forward"
    """Gradients of a backward that the model ran inside the wrapper's forward, which reduces none."""
    SYNC_OFF = "sync_off"
    """Gradients of a wrapper's forward under `no_sync()` arrived, and none were reduced before the step."""
    CONSUMED = "consumed"
    """Gradients arrived after an earlier backward had used up the reducer's one reduction."""
    AUTOGRAD_GRAD = "autograd_grad"
    """Gradients were taken with `torch.autograd.grad`, which no reducer sees."""
    WRITTEN = "written"
    """Gradients were there without any backward: the script wrote them, and not the same on all ranks."""
    UNOWNED = "unowned"
    """A parameter was stepped that no reducer owns."""
    OUTSIDE = "outside"
    """Parameters outside every wrapped model were the same on all ranks at first, and drifted apart."""
    DETACHED = "detached"
    """A parameter's storage was replaced, so that the reducer's hook hangs on a node no backward reaches."""
    STEPPED_EARLY = "stepped_early"
    """The optimizer stepped inside a backward, before the gradients were reduced."""

    NO_SYNC_WITHOUT_EFFECT = "no_sync_without_effect"
    HOOKS_SKIPPED = "hooks_skipped"
    STALE_WEIGHT = "stale_weight"
    COMPILED_BYPASSED = "compiled_bypassed"
    LATE_HOOK = "late_hook"
    PRECISION_LOST = "precision_lost"
    SHARDED_BYPASSED = "sharded_bypassed"
    SHARDED_UNREDUCED = "sharded_unreduced"
    """Gradients of a forward past a sharded module's hooks never reached its shards."""
    SHARDED_SYNC_OFF = "sharded_sync_off"
    """A sharded module's gradients were kept unreduced over an optimizer step."""


@dataclass(frozen=True)
class Event:
    """Something that happened on this rank.

    Attributes:
        kind: What.
        site: The user's line to blame.
        step: Optimizer step, from 1, in which it did harm; 0 before the first.
        parameters: Names of the parameters concerned, as in the wrapped module's `state_dict`.
        others: Further lines that belong to it.
        facts: What the message needs beyond that, by kind.
    """

    kind: EventKind
    site: CallSite = NOWHERE
    step: int = 0
    parameters: tuple[str, ...] = ()
    others: tuple[CallSite, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


Emit = Callable[[Event], None]


class Guard(Protocol):
    """Does the watch's own work so that an error in it does not reach the script."""

    def __call__(self, work: Callable[..., Any], *args: Any) -> None: ...
