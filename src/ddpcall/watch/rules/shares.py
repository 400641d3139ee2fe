"""DC402: what the ranks are given of the data overlaps, or leaves some of it out."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from ddpcall.taps import CallSite
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.loaders import MAX_KEPT, Pass, Share

PART = "shares"
"""What the ranks' answers are asked for under."""
ENOUGH = 1024
"""Indices after which a long epoch is judged before it is over, and then whenever they have doubled."""
_LEAST_GIVEN, _LEAST_TWICE = 8, 4
_MOST_SENT = 2**11
_MOST_PASSES = 6
_EARLY = 3
_MIX = np.uint64(0x9E3779B97F4A7C15)

Facts = dict[str, Any]


@dataclass(eq=False)
class _Shared:
    """What one sampler shares out.

    Attributes:
        source: The dataset.
        number: Its place among those that were trained on; None before it was.
        num_passes: How often it was iterated.
    """

    source: weakref.ref[Any]
    number: int | None = None
    num_passes: int = 0


@dataclass(eq=False)
class _Followed:
    """A pass, what it is one of, and its number among those, from 1."""

    current: Pass
    share: Share
    shared: _Shared
    number: int


@dataclass(frozen=True)
class _Seen:
    """A pass as it stood when vitals were taken; `is_alone`: nothing else shares its dataset out."""

    name: str
    current: Pass
    share: Share
    number: int
    num_kept: int
    num_given: int
    is_whole: bool
    is_alone: bool
    is_last: bool


@dataclass(frozen=True)
class _Cause:
    """Why shares do not partition the data: in what ranks differ, what to write, and where.

    Attributes:
        leaves_out: Whether the harm is in what is not given.
        is_measured: Whether nothing tells but the indices.
    """

    text: str
    fix: str
    site: CallSite
    leaves_out: bool = False
    is_measured: bool = False


_BY_GROUP = "Leave `rank` and `num_replicas` out: DistributedSampler takes them from the process group."
_BY_ACCELERATE = "Give the loader no DistributedSampler: accelerate shares the data out itself."
_ONE_SEED = "Give every rank the same `seed`: a rank's own share comes from its `rank`, of one permutation."
_ONE_EPOCH = (
    "Call `set_epoch` with the same number on every rank: each takes its share of that epoch's permutation."
)
_ONE_ORDER = (
    "Let the sampler draw the same order on every rank, from a generator with one seed: accelerate gives each "
    "rank its batches of it."
)


class ShareRule(Rule):
    """Tells what this rank was given in its passes, and judges on rank 0 what all ranks tell.

    Blind to: samplers other than DistributedSampler and accelerate's shards; evaluation; ranks beyond the 16 that
    are asked; what comes after the first `MAX_KEPT` indices of a pass.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._followed: list[_Followed] = []
        self._by_sampler: weakref.WeakKeyDictionary[Any, _Shared] = weakref.WeakKeyDictionary()
        self._trained: list[_Shared] = []
        self._due: set[int] = set()
        self._asked: set[tuple[str, bool, int]] = set()
        self._here: dict[str, _Seen] = {}
        self._found: set[int] = set()
        self._batch: int | None = None

    # ---- every rank ------------------------------------------------------------------------------------------

    def taken(self, current: Pass) -> None:
        """Follow a pass that begins: beside it, of the same sampler, the last one that trained."""
        share = current.share
        sampler = None if share is None else share.sampler()
        if share is None or sampler is None or current.num_taken != 1:
            return
        shared = self._by_sampler.setdefault(sampler, _Shared(current.source))
        shared.num_passes += 1
        others = [each for each in self._followed if each.shared is not shared]
        before = [each for each in self._followed if each.shared is shared and self._has_trained(each.current)]
        now = _Followed(current, share, shared, shared.num_passes)
        self._followed = [*others[2 - _MOST_PASSES :], *before[-1:], now]

    def ended(self, current: Pass) -> None:
        """Nothing is done: a pass that is over is judged with the next vitals."""

    def _has_trained(self, current: Pass) -> bool:
        return current.num_steps > 0 or (not current.is_over and self._run.steps.preparing() > current.first_step)

    def tell(self, step: int, rank: int, batch: int | None, is_last: bool) -> Callable[[], dict[str, Any]]:
        """Return what gives, on any thread, this rank's indices so far, by name of the pass.

        Args:
            step: What the answer is asked for by.
            rank: This rank.
            batch: Digest of what the wrapper was called with.
            is_last: Whether this rank leaves.
        """
        self._batch = batch if batch is not None else self._batch
        seen = [self._see(each, is_last) for each in self._followed if self._has_trained(each.current)]
        seen = [each for each in seen if each.num_given >= _LEAST_GIVEN]
        for each in seen:
            state = (each.name, each.is_whole, each.num_given.bit_length())
            is_early = each.number <= _EARLY or each.number & (each.number - 1) == 0
            is_news = state not in self._asked and is_early and (each.is_whole or each.num_given >= ENOUGH)
            if is_news or is_last:
                self._asked.add(state)
                self._due.add(step)
        self._here = {each.name: each for each in (*self._here.values(), *seen)}
        self._here = dict(list(self._here.items())[-_MOST_PASSES:])
        return partial(_describe, seen, rank, self._batch)

    def _see(self, followed: _Followed, is_last: bool) -> _Seen:
        current, shared = followed.current, followed.shared
        if shared.number is None:
            shared.number = len(self._trained)
            self._trained.append(shared)
        return _Seen(
            f"{shared.number}/{followed.number}",
            current,
            followed.share,
            followed.number,
            len(current.indices),
            current.num_drawn,
            current.is_over or current.num_drawn == followed.share.num_given,
            sum(each.source() is shared.source() for each in self._trained) == 1,
            is_last,
        )

    # ---- rank 0 ----------------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Say whether the ranks are to be asked what they told at a step; once."""
        is_due = step in self._due
        self._due = {each for each in self._due if each > step}
        return is_due

    def judge_answers(
        self, answers: Mapping[str, Mapping[int, Any]], ranks: tuple[int, ...], world_size: int
    ) -> None:
        """Judge what ranks answered.

        Args:
            answers: By name of the pass: what each rank told.
            ranks: Those that answered.
            world_size: How many there are.
        """
        for name, told in answers.items():
            seen = self._here.get(name)
            if seen is not None and set(told) == set(ranks) and len(told) > 1:
                by_rank = {rank: json.loads(text) for rank, text in told.items()}
                self._judge(seen, by_rank, world_size)

    def _judge(self, seen: _Seen, told: dict[int, Facts], world_size: int) -> None:
        facts = list(told.values())
        is_even = all(_alike(facts, key) for key in ("samples", "of", "shift"))
        loader = int(seen.name.partition("/")[0])
        if not is_even or loader in self._found or any(not each["readable"] for each in facts):
            return
        spare = max(each["spare"] for each in facts)
        if any(len(each["indices"]) - len(set(each["indices"])) > spare for each in facts):
            return  # drawn with replacement
        cause = _find_cause(seen, told, world_size)
        times = Counter(index for each in facts for index in set(each["indices"]))
        twice = sum(count > 1 for count in times.values())
        if cause is None:
            return
        least = max(2 * _LEAST_TWICE, len(times) // 50) if cause.is_measured else _LEAST_TWICE
        if not cause.leaves_out and twice < spare + least:
            return
        if cause.leaves_out and not (all(each["whole"] for each in facts) and seen.num_given <= MAX_KEPT):
            return
        self._found.add(loader)
        self.report(
            "DC402",
            "shares_overlap",
            cause.site,
            f"{cause.text} {_count(facts, times, len(told) == world_size)}",
            step=seen.current.first_step,
            ranks=tuple(told),
            fix=cause.fix,
        )


def _describe(seen: list[_Seen], rank: int, batch: int | None) -> dict[str, Any]:
    """Return what a rank tells, as text by pass; `process` makes the texts differ, so that all are handed on."""
    told: dict[str, Any] = {}
    for each in seen:
        shift = max(0, (each.num_kept - 1).bit_length() - _MOST_SENT.bit_length() + 1)
        indices = np.frombuffer(each.current.indices[: each.num_kept], dtype=np.int64)
        mixed = indices.astype(np.uint64) * _MIX >> np.uint64(32)
        told[each.name] = json.dumps(
            {
                "process": rank,
                "of": each.share.of,
                "samples": each.share.num_samples,
                "replicas": each.share.num_replicas,
                "rank": each.share.rank,
                "order": each.share.order,
                "spare": each.share.num_spare,
                "given": each.num_given,
                "whole": each.is_whole,
                "readable": each.current.is_readable,
                "batch": batch,
                "shift": shift,
                "indices": indices[mixed & np.uint64((1 << shift) - 1) == 0].tolist(),
            }
        )
    return told


def _alike(facts: list[Facts], key: str) -> bool:
    return all(each[key] == facts[0][key] for each in facts)


def _find_cause(seen: _Seen, told: dict[int, Facts], world_size: int) -> _Cause | None:
    """Say from what samplers were told why shares overlap or leave samples out; None where they need not."""
    facts, share = list(told.values()), seen.share
    if not _alike(facts, "replicas"):
        return _Cause(_tell_apart("num_replicas", told, "replicas"), _BY_GROUP, share.made)
    num_replicas = facts[0]["replicas"]
    by_share: dict[str, list[int]] = {}
    for rank, each in told.items():
        by_share.setdefault(f"{each['rank']}", []).append(rank)
    shared = next((ranks for ranks in by_share.values() if len(ranks) > 1), None)
    if shared is not None:
        # Each rank may have a dataset of its own: where they are given the same indices, their batches tell.
        same = all(told[a]["order"] == told[b]["order"] for a, b in pairwise(shared))
        batches = {told[rank]["batch"] for rank in shared}
        if (num_replicas == 1 or same) and (not same or len(batches) > 1 or None in batches):
            return None
        text = "num_replicas=1" if num_replicas == 1 else f"rank={told[shared[0]]['rank']}"
        return _Cause(f"{share.of} was made with {text} on ranks {_list(shared)}.", _BY_GROUP, share.made)
    if num_replicas > world_size:
        # Shares that nobody has now may have their turn later, from another sampler.
        if not seen.is_alone or (seen.number < 2 and not seen.is_last):
            return None
        text = f"The data is divided into {num_replicas} shares for {world_size} ranks."
        if share.of == "DistributedSampler":
            return _Cause(text, _BY_GROUP, share.made, leaves_out=True)
        text = f"accelerate divides the share of each DistributedSampler again. {text}"
        return _Cause(text, _BY_ACCELERATE, share.made, leaves_out=True)
    if num_replicas < world_size:
        return None
    if share.of != "DistributedSampler":
        return _Cause(
            "The ranks' samplers gave different orders.", _ONE_ORDER, seen.current.site, is_measured=True
        )
    if _alike(facts, "order"):
        return None
    orders = {rank: each["order"] or [None, None] for rank, each in told.items()}
    if len({seed for seed, _ in orders.values()}) > 1:
        seeds = {rank: {"seed": seed} for rank, (seed, _) in orders.items()}
        return _Cause(_tell_apart("seed", seeds, "seed"), _ONE_SEED, share.made)
    epochs = {rank: {"epoch": epoch} for rank, (_, epoch) in orders.items()}
    return _Cause(_tell_apart("epoch", epochs, "epoch"), _ONE_EPOCH, share.told if share.told.line else share.made)


def _tell_apart(name: str, told: Mapping[int, Facts], key: str) -> str:
    values = [f"{name}={each[key]} on rank {rank}" for rank, each in list(told.items())[:4]]
    return f"The ranks' DistributedSamplers differ: {', '.join(values)}{', …' * (len(told) > 4)}."


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:4])) + ", …" * (len(ranks) > 4)


def _count(facts: list[Facts], times: Counter[int], are_all: bool) -> str:
    shift, num = facts[0]["shift"], facts[0]["samples"]
    about = "about " if shift else ""
    distinct, twice = len(times) << shift, sum(count > 1 for count in times.values()) << shift
    if are_all and all(each["whole"] and each["given"] <= MAX_KEPT for each in facts):
        seen = f"{about}{distinct} of {num} samples were seen in this epoch"
        return seen[0].upper() + seen[1:] + (f", {twice} of them by more than one rank." if twice else ".")
    first = min(MAX_KEPT, max(each["given"] for each in facts))
    return f"Of the first {first} indices of each rank, {about}{twice} were given to more than one."
