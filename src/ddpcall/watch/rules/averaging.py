"""Local SGD by hand: gradients stay local on purpose, and the script averages the parameters after the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from ddpcall.replicas import digest_tensor
from ddpcall.taps import CallSite
from ddpcall.watch.events import Event, EventKind
from ddpcall.watch.sensors.collectives import CollectiveLog, Mark

PATIENCE_STEPS = 64


@dataclass
class _Said:
    event: Event
    parameters: list[Tensor]
    digests: list[int]
    mark: Mark


class AveragingWatch:
    """Takes back what was said about unreduced gradients when the script averages the parameters instead.

    That it does shows between two steps: the parameters changed, and as many numbers went through collectives.
    Looked for while there is something to take back, in the 64 steps after it was first said.
    """

    def __init__(self, collectives: CollectiveLog, retract: Callable[[Event], None]) -> None:
        """Take the log of collectives, and what takes an event back."""
        self._collectives = collectives
        self._retract = retract
        self._said: dict[tuple[EventKind, CallSite], _Said] = {}
        self._averaged: set[tuple[EventKind, CallSite]] = set()

    def is_averaged(self, event: Event) -> bool:
        """Say whether an event's parameters were seen to be averaged by the script."""
        return (event.kind, event.site) in self._averaged

    def has_any(self) -> bool:
        """Say whether parameters differ on purpose between some steps."""
        return bool(self._averaged)

    def said(self, event: Event, parameters: Iterable[Tensor]) -> None:
        """Note an event that was emitted, before the step that uses the gradients."""
        known = self._said.get((event.kind, event.site))
        first = event if known is None else known.event
        if event.step < first.step + PATIENCE_STEPS:
            self._said[event.kind, event.site] = _Said(first, list(parameters), [], Mark())

    def stepped(self) -> None:
        """Note the parameters as an optimizer's step left them."""
        for said in self._said.values():
            said.digests = list(map(digest_tensor, said.parameters))
            said.mark = self._collectives.mark()

    def look(self) -> None:
        """Look, before the next step, whether the parameters were averaged since the last."""
        for key, said in list(self._said.items()):
            if not said.digests or not self._collectives.covers(said.parameters, said.mark):
                continue
            if all(old != new for old, new in zip(said.digests, map(digest_tensor, said.parameters), strict=True)):
                del self._said[key]
                self._averaged.add(key)
                self._retract(said.event)
