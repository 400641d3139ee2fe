"""Local SGD by hand: gradients stay local on purpose, and the script averages the parameters after the step."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from ddpcall.replicas import digest_tensor
from ddpcall.watch.findings_book import FindingsBook
from ddpcall.watch.sensors.collectives import CollectiveLog, Mark

PATIENCE_STEPS = 64


@dataclass
class _Doubted:
    first_step: int
    parameters: list[Tensor]
    digests: list[int] = field(default_factory=list)
    mark: Mark = field(default_factory=Mark)


class AveragingWatch:
    """Withdraws what was found of unreduced gradients when the script averages the parameters instead.

    That it does shows between two steps: the parameters changed, and as many numbers went through collectives.
    Looked for in the 64 steps after gradients were first found unreduced.
    """

    def __init__(self, collectives: CollectiveLog, book: FindingsBook) -> None:
        """Take the log of collectives, and where findings are withdrawn."""
        self._collectives = collectives
        self._book = book
        self._doubted: dict[Hashable, _Doubted] = {}

    def doubt(self, key: Hashable, step: int, parameters: Iterable[Tensor]) -> None:
        """Note a finding that may have to be withdrawn, before the step that uses the gradients."""
        first = self._doubted[key].first_step if key in self._doubted else step
        if step < first + PATIENCE_STEPS:
            self._doubted[key] = _Doubted(first, list(parameters))

    def stepped(self) -> None:
        """Note the parameters as an optimizer's step left them."""
        for doubted in self._doubted.values():
            doubted.digests = list(map(digest_tensor, doubted.parameters))
            doubted.mark = self._collectives.mark()

    def look(self) -> None:
        """Look, before the next step, whether the parameters were averaged since the last."""
        for key, doubted in list(self._doubted.items()):
            if not doubted.digests or not self._collectives.covers(doubted.parameters, doubted.mark):
                continue
            now = map(digest_tensor, doubted.parameters)
            if all(old != new for old, new in zip(doubted.digests, now, strict=True)):
                del self._doubted[key]
                self._book.withdraw(key)
