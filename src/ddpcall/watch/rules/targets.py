"""DC110: means over each rank's own targets, averaged evenly though the ranks' numbers of targets differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ddpcall.findings import Finding
from ddpcall.mixing.record import RankSketches
from ddpcall.mixing.result import Mixing
from ddpcall.taps import NOWHERE, CallSite
from ddpcall.watch.rules.rule import make_finding

APART = 1.1
"""Times as many targets on the rank that has most as on the one that has fewest."""
_ALIKE = 1.01
_EVENLY = ("averaged", "summed", "scaled")
_DECIDED_AFTER = 8
_REPEATED = 2
_MOST_SHOWN = 4


@dataclass
class _Line:
    """What was seen of one line's means in measured steps."""

    num_judged: int = 0
    num_apart: int = 0
    first_step: int = 0
    first_counts: tuple[int, ...] = ()

    def is_apart(self) -> bool:
        """Say whether the numbers differ as a rule: the last batch of an epoch alone is no harm to speak of."""
        return self.num_apart >= _REPEATED and 2 * self.num_apart > self.num_judged


class TargetsRule:
    """Compares numbers of targets in the measured steps; lives on the rank that compares.

    Args:
        report: Gets the finding, once a run.
        find_site: Returns the line of a place.

    Blind to: numbers that differ between the micro-batches of one rank alone; class weights; a line that takes
    several means for one backward (sequence by sequence, say): there a target is not what the script weighs.
    """

    def __init__(self, report: Callable[[Finding], None], find_site: Callable[[str], CallSite]) -> None:
        self._report = report
        self._find_site = find_site
        self._lines: dict[str, _Line] = {}
        self._has_reported = False

    def judge(self, step: int, records: Sequence[RankSketches], mixing: Mixing) -> None:
        """Judge one measured step.

        Args:
            step: The optimizer's number of it.
            records: All ranks' records.
            mixing: Who learned from whom in it.
        """
        if mixing.shape not in _EVENLY or self._has_reported:
            return
        of_ranks = [{place: numbers for place, *numbers in record.targets} for record in records]
        for place in of_ranks[0]:
            if all(place in own for own in of_ranks):
                self._note(place, step, *zip(*(own[place] for own in of_ranks), strict=True))

    def _note(
        self, place: str, step: int, counts: tuple[int, ...], factors: tuple[float, ...], in_one: tuple[int, ...]
    ) -> None:
        if max(in_one) > 1 or min(counts) <= 0:
            return
        line = self._lines.setdefault(place, _Line())
        line.num_judged += 1
        # A loss that is multiplied by its own number of targets is not averaged evenly.
        is_even = 0 < max(factors) <= _ALIKE * min(factors)
        if is_even and max(counts) > APART * min(counts):
            line.num_apart += 1
            if line.num_apart == 1:
                line.first_step, line.first_counts = step, counts
        if line.num_judged == _DECIDED_AFTER:
            self._decide(place, line)

    def close(self) -> None:
        """Judge what was seen in fewer steps."""
        for place, line in self._lines.items():
            if line.num_judged < _DECIDED_AFTER:
                self._decide(place, line)

    def _decide(self, place: str, line: _Line) -> None:
        if self._has_reported or not line.is_apart():
            return
        self._has_reported = True
        site = self._find_site(place)
        self._report(
            make_finding(
                "DC110",
                "uneven_targets",
                site if site != NOWHERE else CallSite(*_split(place)),
                _describe(line),
                step=line.first_step,
                ranks=tuple(range(len(line.first_counts))),
            )
        )


def _split(place: str) -> tuple[str, int, str]:
    file, _, line = place.rpartition(":")
    return file, int(line), ""


def _describe(line: _Line) -> str:
    counts, total = line.first_counts, sum(line.first_counts)
    shares = [f"{count / total:.2f}" for count in counts]
    told = [str(count) for count in counts]
    if len(counts) > _MOST_SHOWN:
        shares, told = [f"from {min(shares)} to {max(shares)}"], [f"from {min(counts)} to {max(counts)}"]
    return (
        "The loss is a mean over each rank's own targets, and the gradients are averaged evenly: each rank weighs "
        f"{1 / len(counts):.2f}; its targets are {_list(shares)} of the batch ({_list(told)} in optimizer step "
        f"{line.first_step}). They differed by more than a tenth in {line.num_apart} of {line.num_judged} "
        "measured steps. One process with the whole batch would weigh every target alike."
    )


def _list(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
