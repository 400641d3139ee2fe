"""DC401: the data comes in the same order in every epoch."""

from __future__ import annotations

from itertools import pairwise

from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.loaders import Pass

ENOUGH = 1024
"""Indices after which a long epoch is judged before it is over."""
_LEAST_TOLD, _LEAST = 8, 12
"""Indices that do not agree by chance: of a sampler that was told the same epoch twice, and of any other."""
_KEPT = 3


class OrderRule(Rule):
    """Compares a training epoch's order with that of the one before.

    An epoch whose number the script told again, by a call between the two, is repeated on purpose.

    Blind to: an order that alternates; epochs of datasets that are made anew.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._passes: list[Pass] = []
        self._open: list[Pass] = []

    def taken(self, current: Pass) -> None:
        """Judge an epoch that is long enough; where one begins, those before it that were broken off."""
        if not current.shuffles:
            return
        if current.num_taken == 1:
            for earlier in [each for each in self._open if each.source() is current.source()]:
                self.ended(earlier)
            self._open.append(current)
        elif current in self._open and len(current.indices) >= ENOUGH and current.is_training:
            self.ended(current)

    def ended(self, current: Pass) -> None:
        """Judge an epoch, once, and keep it for the next."""
        if current not in self._open:
            return
        self._open.remove(current)
        if not (current.is_training and current.is_readable):
            return
        of_same = [each for each in self._passes if each.source() is current.source()]
        before = [
            each for each in of_same if each.last < current.begun and _optimizer(each) is _optimizer(current)
        ]
        if before:
            self._compare(before[-1], current)
        gone = {id(each) for each in of_same[: 1 - _KEPT]} | {id(e) for e in self._passes if e.source() is None}
        self._passes = [*(each for each in self._passes if id(each) not in gone), current]

    def _compare(self, before: Pass, current: Pass) -> None:
        num = min(len(before.indices), len(current.indices))
        is_told_the_same = current.is_told_epochs and current.epoch == before.epoch is not None
        if is_told_the_same and current.times_told > before.times_told:
            return
        if num < (_LEAST_TOLD if is_told_the_same else _LEAST) or before.indices[:num] != current.indices[:num]:
            return
        has_grown = before.is_over and current.is_over and before.num_drawn != current.num_drawn
        if has_grown or all(one < other for one, other in pairwise(current.indices[:num])):
            return  # a curriculum, or an order that is not shuffled
        whole = "" if current.is_over and before.is_over and num == current.num_drawn else "first "
        message = (
            f"{current.sampler} gave this loop the same {whole}{num} indices in the same order as in the epoch "
            f"before, which began with optimizer step {before.first_step}"
        )
        message += f": it was told epoch {current.epoch} both times." if is_told_the_same else "."
        self.report("DC401", "same_order", current.site, message, step=current.first_step, fix=_advise(current))

    def close(self, in_order: bool) -> None:
        """Judge epochs that were broken off."""
        for current in list(self._open):
            self.ended(current)


def _optimizer(epoch: Pass) -> object:
    return None if epoch.optimizer is None else epoch.optimizer()


def _advise(current: Pass) -> str:
    if not current.is_told_epochs:
        return (
            "Seed the generator that the sampler draws from once, before the first epoch, or with another number "
            "in every epoch: `generator.manual_seed(seed + epoch)`."
        )
    called = f"`{current.spelling}.set_epoch(epoch)`" if current.spelling else ""
    return called and f"{called} before each epoch's loop."


RULES = (OrderRule,)
