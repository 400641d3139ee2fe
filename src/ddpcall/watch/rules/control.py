"""DC502 and DC503: ranks that do not do the same, told from where each of them is. Pure: no torch, no clock."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import le

from ddpcall.findings import Finding, Severity
from ddpcall.taps import CallSite
from ddpcall.watch.rules.rule import make_finding
from ddpcall.watch.sensors.positions import ENDED, FAILED, LEFT, RUNS, Position

_MOST_TOLD = 8
_SAME_ON_ALL = (
    "Let every rank run the same collectives in the same order. Where only some ranks reach a line, by their own "
    "loss, their own number of batches or their rank, let all agree first: "
    "`dist.all_reduce(flag, op=dist.ReduceOp.MIN)`."
)
_UNEVEN = (
    "Give every rank the same number of batches (`drop_last=True`, DistributedSampler), or train inside "
    "`torch.distributed.algorithms.join.Join`."
)


@dataclass(frozen=True)
class Silence:
    """What one look at all ranks shows, taken by a rank that waits.

    Attributes:
        rank: The rank that waits.
        positions: By rank; the one's own is of now, the others' of a moment ago.
        bound_s: Seconds without progress after which a rank that is in a collective counts as waiting.
    """

    rank: int
    positions: Mapping[int, Position]
    bound_s: float

    @property
    def own(self) -> Position:
        """The position of the rank that looks."""
        return self.positions[self.rank]

    def waiting(self) -> list[int]:
        """Return the ranks that have been in a collective for longer than the bound."""
        # Another rank's position was written a while ago: it may have waited as long by now.
        least_s = self.bound_s * 0.75
        return [r for r, p in self.positions.items() if p.state == RUNS and p.operation and p.silent_s >= least_s]

    def describe(self) -> str:
        """Say where each rank is."""
        waiting, told = set(self.waiting()), list(self.positions.items())
        lines = [f"  {_describe(rank, position, rank in waiting)}" for rank, position in told[:_MOST_TOLD]]
        lines += [f"  and {len(told) - _MOST_TOLD} more ranks"] * (len(told) > _MOST_TOLD)
        return "\n".join(lines)

    def judge(self, num_ranks: int) -> Finding | None:
        """Return what contradicts: ranks that can never meet. A rank that is only slow is none.

        Args:
            num_ranks: How many there are; of those that are not in `positions` nothing is known.
        """
        waiting = self.waiting()
        if self.rank not in waiting:
            return None
        others = [self.positions[rank] for rank in waiting]
        ended = [rank for rank, position in self.positions.items() if position.state == ENDED]
        is_told = len(waiting) + len(ended) == num_ranks
        if ended and (self.own.is_of_all or is_told):
            return self._report("ended", self.rank, ended[0])
        if not all(position.sequence or not position.group for position in others):
            return None  # a send or a receive: who waits for whom is not known
        apart = [rank for rank in waiting if _is_apart(self.own, self.positions[rank])]
        if apart and (is_told or any(_is_paired(self.own, self.positions[rank]) for rank in apart)):
            # The line of a backward that another rank does not run tells more than where that rank is instead.
            first, other = sorted((self.rank, apart[0]), key=lambda rank: -self.positions[rank].backwards)
            return self._report("elsewhere", first, other)
        running = {r: p for r, p in self.positions.items() if p.state == RUNS and not p.operation}
        past = [r for r, p in running.items() if p.steps > self.own.steps and self.own.forwards]
        return self._report("past", self.rank, past[0], Severity.WARNING) if past and self.own.is_of_all else None

    def standing(self) -> list[tuple[int, Position]]:
        """Return the ranks that wait or are over, without times: two looks that agree show one state."""
        waiting = set(self.waiting())
        over = (ENDED, FAILED)
        return [
            (r, replace(p, silent_s=0.0)) for r, p in self.positions.items() if r in waiting or p.state in over
        ]

    def _report(self, cause: str, rank: int, other: int, severity: Severity = Severity.ERROR) -> Finding:
        one, theirs = self.positions[rank], self.positions[other]
        message = f"Rank {rank} has waited {one.silent_s:.0f} s in `{one.call or one.operation}` here"
        if cause == "ended":
            message += f", and the script of rank {other} is over."
        elif cause == "past":
            message += f", and rank {other} is past it, at {_place(theirs.site)}."
        else:
            message += (
                f", and rank {other} in `{theirs.call or theirs.operation}` ({_place(theirs.site)}): they wait "
                "for each other, and neither goes on."
            )
        if one.call == "backward" and theirs.forwards >= one.forwards and theirs.backwards < one.backwards:
            message += f" Rank {other} skipped the backward here."
        message += f" Rank {rank}: {_count(one)}; rank {other}: {_count(theirs)}."
        return make_finding(
            "DC503",
            cause,
            one.site,
            message,
            step=one.steps + 1,
            ranks=tuple(sorted((rank, other))),
            fix=_UNEVEN if cause == "ended" else _SAME_ON_ALL,
            severity=severity,
        )


def _is_apart(one: Position, other: Position) -> bool:
    """Say whether two ranks that wait do not wait for the same."""
    mine, theirs = ((p.call, p.operation, p.sequence, p.group) for p in (one, other))
    return mine != theirs


def _is_paired(one: Position, other: Position) -> bool:
    """Say whether two ranks are in one group's collective of the same number, and it is not the same one."""
    same_place = (one.group, one.sequence) == (other.group, other.sequence)
    return bool(one.sequence) and same_place and one.operation != other.operation


def judge_ends(own: Position, positions: Mapping[int, Position], site: CallSite) -> Finding | None:
    """Return what is wrong where a collective failed on this rank, since another rank's script was over.

    Args:
        own: Where this rank was.
        positions: The other ranks'.
        site: The line that failed.
    """
    ended = {rank: position for rank, position in positions.items() if position.state == ENDED}
    fewer = [
        rank
        for rank, position in ended.items()
        if position.counts != own.counts and all(map(le, position.counts, own.counts))
    ]
    if not fewer:
        return None
    rank = fewer[0]
    message = (
        f"This rank failed here, with {_count(own)}, because rank {rank} was gone: its script was over after "
        f"{_count(positions[rank])}. The ranks took different numbers of steps."
    )
    return make_finding("DC502", "ended", site, message, step=own.steps + 1, ranks=tuple(fewer), fix=_UNEVEN)


def _describe(rank: int, position: Position, is_waiting: bool) -> str:
    if position.state in (ENDED, FAILED):
        return f"rank {rank}: its script has {position.state}, after {_count(position)}"
    if position.state == LEFT:
        return f"rank {rank}: it is not watched any more, after {_count(position)}"
    doing = f"waits in `{position.call or position.operation}`" if is_waiting else "runs"
    if not is_waiting and position.call:
        doing = f"is in `{position.call}`"
    place = f" at {_place(position.site)}" if position.site.line else ""
    return f"rank {rank}: {doing}{place}, {position.silent_s:.0f} s after its last progress, {_count(position)}"


def _count(position: Position) -> str:
    numbers = (position.forwards, "forward"), (position.backwards, "backward"), (position.steps, "step")
    return ", ".join(f"{number} {name}{'s' * (number != 1)}" for number, name in numbers)


def _place(site: CallSite) -> str:
    return f"{os.path.basename(site.file)}:{site.line}" if site.line else "a line that is not known"


def missing(positions: Iterable[int], num_ranks: int) -> str:
    """Return a line for the ranks of which nothing was heard; empty where there are none."""
    unheard = sorted(set(range(num_ranks)) - set(positions))
    listed = ", ".join(map(str, unheard[:_MOST_TOLD])) + ", …" * (len(unheard) > _MOST_TOLD)
    return f"\n  nothing was heard of rank{'s' * (len(unheard) > 1)} {listed}" if unheard else ""
