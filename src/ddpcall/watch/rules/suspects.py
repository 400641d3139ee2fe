"""Gradients that may be in order: whether they are shows only when the ranks are compared."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ddpcall.replicas import digest_tensor
from ddpcall.taps import CallSite
from ddpcall.watch.events import Emit, Event, EventKind


class Suspects:
    """Events that harm nobody unless their gradients were not the same on all ranks.

    The script reduced them itself, as far as its collectives tell, or wrote them itself. Where the parameters
    differ all the same, and these gradients too, the events say why.
    """

    def __init__(self, emit: Emit) -> None:
        """Take where events go that turn out to be harm."""
        self._emit = emit
        self._events: dict[tuple[EventKind, CallSite], Event] = {}
        self._digests: dict[tuple[EventKind, CallSite], tuple[int, ...]] = {}

    def add(self, event: Event, gradients: Iterable[Tensor]) -> None:
        """Suspect an event; digests the gradients that are about to be used."""
        self._events.setdefault((event.kind, event.site), event)
        self._digests[event.kind, event.site] = tuple(map(digest_tensor, gradients))

    def digest(self) -> int | None:
        """Return a digest of the gradients as they were last used, None where nothing is suspected."""
        return hash(tuple(self._digests.values())) if self._digests else None

    def convict(self) -> None:
        """Emit what was suspected."""
        events, self._events = self._events, {}
        for event in events.values():
            self._emit(event)
