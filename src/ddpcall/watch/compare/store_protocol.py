"""What ranks leave for each other on the store, and what can be read from it; no thread, no waiting.

Per step a rank reads the state, which the comparing rank keeps (last steps that were compared, questions), appends
a summary of its digests to a node that it shares with seven others, and counts itself there.
The rank that completes a node merges its eight summaries and appends the result one level up. So the root tells
of all, and one rank in eight makes three requests more, however many ranks there are. Numbers that add up, such as
sketches, are added on the same path.

The comparing rank reads the root, and below it only nodes that are not complete. A node is deleted, once its step
was compared, by the rank that was first in it.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
from torch.distributed import PrefixStore, Store

from ddpcall.launch_environment import read_attempt
from ddpcall.watch.compare.summary import Summary, merge
from ddpcall.watch.compare.vitals import OWN_PARTS, REPLICAS, Details, Facts, Vitals

FAN_OUT = 8
MAX_KEPT_STEPS = 64
_ABSENT = "absent"


@dataclass(frozen=True)
class Comparison:
    """What the ranks' vitals of one step say about each other.

    Attributes:
        step: Its number.
        num_ranks: How many ranks' vitals were compared.
        missing: Ranks whose vitals were not there in time: slow, finished, stopped or dead.
        same: Parts that are equal on all the ranks that were compared.
        differing: By replicated part that differs: the groups of ranks that agree with each other, largest first.
        unlike: Own parts (batch, rng) that are not equal on all ranks, as they should be (batch) or may be (rng).
        ungrouped: Ranks known to differ from others, but not who agrees with whom: there were too many digests.
        digests: By replicated part that differs: the digest of each group.
        sums: What the ranks' numbers add up to; None where not all of them left as many.
    """

    step: int
    num_ranks: int
    missing: tuple[int, ...]
    same: tuple[str, ...]
    differing: dict[str, tuple[tuple[int, ...], ...]]
    unlike: tuple[str, ...]
    ungrouped: tuple[int, ...] = ()
    digests: dict[str, tuple[int | None, ...]] = field(default_factory=dict, compare=False)
    sums: np.ndarray | None = field(default=None, compare=False)

    @staticmethod
    def of(step: int, summary: Summary, world_size: int) -> Comparison:
        """Say what a summary of all ranks that are there tells."""
        left = summary.ungrouped
        uneven = {part: groups for part, groups in summary.groups.items() if len(groups) > 1 or part in left}
        differing = {part: groups for part, groups in uneven.items() if part not in OWN_PARTS}
        return Comparison(
            step=step,
            num_ranks=len(summary.ranks),
            missing=tuple(rank for rank in range(world_size) if rank not in summary.ranks),
            same=tuple(part for part, told in summary.groups.items() if part not in uneven and None not in told),
            differing={part: tuple(tuple(sorted(g)) for g in told.values()) for part, told in differing.items()},
            unlike=tuple(part for part in OWN_PARTS if part in uneven),
            ungrouped=tuple(sorted(frozenset().union(*(left.get(part, ()) for part in differing)))),
            digests={part: tuple(told) for part, told in differing.items()},
            sums=summary.sums if summary.summed == summary.ranks else None,
        )


@dataclass(frozen=True)
class DetailsComparison:
    """What the answers to a question say about each other, one rank of each group being asked.

    Attributes:
        step: The step that was asked about.
        ranks: The ranks that answered.
        missing: The ranks that were asked and did not answer in time.
        forgotten: The ranks that have not kept the step, or the details.
        differing: By part, by name of parameter, buffer, module or setting: the value by rank, where they
            differ; a rank that lacks the name is absent.
        measures: By part that all of them measured, by name: by rank, what `read_drift` takes.
        facts: By rank, what it did.
    """

    step: int
    ranks: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    forgotten: tuple[int, ...] = ()
    differing: dict[str, dict[str, dict[int, int | str | float]]] = field(default_factory=dict)
    measures: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)
    facts: dict[int, Facts] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What one rank tells of a step: details and measures by part, as far as it kept them."""

    details: dict[str, Details]
    measures: dict[str, dict[str, str]]
    facts: Facts

    @staticmethod
    def of(vitals: Vitals, parts: Iterable[str]) -> Answer:
        """Return what a rank's vitals tell of some parts."""
        details = {part: vitals.details[part]() for part in parts if part in vitals.details}
        measures = {part: vitals.measures[part]() for part in parts if part in vitals.measures}
        return Answer(details, measures, vitals.facts())

    def to_bytes(self) -> bytes:
        """Return plain values as bytes."""
        told = [self.details, self.measures, self.facts.to_json()]
        return zlib.compress(json.dumps(told).encode(), 1)

    @staticmethod
    def from_bytes(data: bytes) -> Answer:
        """Read what `to_bytes` wrote."""
        details, measures, facts = json.loads(zlib.decompress(data))
        return Answer(details, measures, Facts.from_json(facts))


@dataclass(frozen=True)
class Question:
    """What the comparing rank asks for: details of `parts` of `step` from `ranks`; of gradients, their records."""

    number: int
    step: int
    parts: tuple[str, ...]
    ranks: tuple[int, ...]
    kind: str = REPLICAS


@dataclass(frozen=True)
class State:
    """What the comparing rank tells all others.

    Attributes:
        done: By kind of vitals, the last step that was compared.
        questions: What it asks.
        measure_from: The step from which parameters are to be looked at closely.
        closed: Whether it has left.
    """

    done: Mapping[str, int] = field(default_factory=dict)
    questions: tuple[Question, ...] = ()
    measure_from: int = sys.maxsize
    closed: bool = False

    def to_json(self) -> str:
        """Return the state as it is written to the store."""
        return json.dumps(
            [self.done, [[*vars(q).values()] for q in self.questions], self.measure_from, self.closed]
        )

    @staticmethod
    def from_json(text: bytes) -> State:
        """Read what `to_json` wrote."""
        done, asked, measure_from, closed = json.loads(text)
        questions = (
            Question(number, step, tuple(parts), tuple(ranks), kind) for number, step, parts, ranks, kind in asked
        )
        return State(done, tuple(questions), measure_from, closed)


class RankStore:
    """The store as one rank uses it, request by request.

    Args:
        store: One that all ranks share.
        rank: This rank.
        world_size: How many ranks there are.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store: Any = store
        self.rank, self.world_size = rank, world_size
        self._name = ""
        self._level_sizes = _count_nodes(world_size)
        self._created: deque[tuple[str, int, str]] = deque()

    def begin(self) -> None:
        """Find the part of the store that this watch has for itself, and say there that this rank is watched.

        Every rank's n-th watch belongs together. torchrun's restarts keep the store: they are counted apart, as
        torch does for the default group.
        """
        attempt = read_attempt()
        number = self._store.add(f"ddpcall/watches/{attempt}/{self.rank}", 1)
        self._name = f"ddpcall/exchange/{attempt}/{number}"
        self._store = PrefixStore(self._name, self._store)
        self._store.set(f"here/{self.rank}", "")

    def connect(self, store: Any, wait_s: float) -> None:
        """Go over to a connection of this rank's own, none of whose requests takes longer than `wait_s`."""
        own = store.clone()
        if own is not store:
            own.set_timeout(timedelta(seconds=wait_s))
        self._store = PrefixStore(self._name, own)

    def read_state(self) -> State | None:
        """Return what the comparing rank last wrote, or None."""
        text = self._read("state")
        return None if text is None else State.from_json(text)

    def write_state(self, state: State) -> None:
        """Replace the state; for the comparing rank alone."""
        self._store.set("state", state.to_json())

    def post(self, vitals: Vitals) -> None:
        """Leave one step's vitals for the comparing rank."""
        summary, index = Summary.of(self.rank, vitals), self.rank
        for level in range(len(self._level_sizes)):
            index //= FAN_OUT
            key = _name_node(vitals.kind, vitals.step, level, index)
            self._store.append(key, summary.to_bytes())
            count = self._store.add(f"{key}/count", 1)
            if count == 1:
                self._created.append((vitals.kind, vitals.step, key))
            if count < self._num_children(level, index):
                return
            summary = merge(self._read_node(key))

    def _num_children(self, level: int, node: int) -> int:
        below = self.world_size if level == 0 else self._level_sizes[level - 1]
        return min(FAN_OUT, below - node * FAN_OUT)

    def _read_node(self, key: str) -> list[Summary]:
        return Summary.read_all(self._read(key) or b"")

    def delete_created(self, done: Mapping[str, int]) -> None:
        """Delete the nodes this rank created for steps that were compared, and those that were kept too long."""
        kept: deque[tuple[str, int, str]] = deque()
        too_many = len({(kind, step) for kind, step, _ in self._created}) - MAX_KEPT_STEPS
        for kind, step, key in self._created:
            if step <= done.get(kind, -1) or too_many > 0:
                too_many -= 1
                self._delete_node(key)
            else:
                kept.append((kind, step, key))
        self._created = kept

    def _delete_node(self, key: str) -> None:
        self._store.delete_key(f"{key}/count")  # first: who comes late counts from 1 again, and deletes the node
        self._store.delete_key(key)

    def delete_step(self, kind: str, step: int) -> None:
        """Delete all of a step's nodes, also those of other ranks: for the last steps of a run."""
        for level, size in enumerate(self._level_sizes):
            for node in range(size):
                self._delete_node(_name_node(kind, step, level, node))

    def is_complete(self, kind: str, step: int) -> bool:
        """Say whether all ranks have left this step's vitals: one request."""
        top = len(self._level_sizes) - 1
        count = self._read(f"{_name_node(kind, step, top, 0)}/count")
        return int(count or 0) == self._num_children(top, 0)

    def compare(self, kind: str, step: int) -> Comparison:
        """Compare what is there, now."""
        summary = merge(self._collect(kind, step, len(self._level_sizes) - 1, 0))
        return Comparison.of(step, summary, self.world_size)

    def _collect(self, kind: str, step: int, level: int, node: int) -> Iterator[Summary]:
        """Yield what is in a node, and what is below those of its children that are not complete."""
        found = self._read_node(_name_node(kind, step, level, node))
        yield from found
        if level:
            complete = {min(each.ranks) // FAN_OUT**level for each in found}
            for child in range(node * FAN_OUT, node * FAN_OUT + self._num_children(level, node)):
                if child not in complete:
                    yield from self._collect(kind, step, level - 1, child)

    def take_back(self) -> None:
        """Say that this rank is no longer watched."""
        self._store.delete_key(f"here/{self.rank}")

    def find_silent(self, ranks: Iterable[int]) -> set[int]:
        """Return those of `ranks` that have not begun, or are no longer watched: one request for each."""
        return {rank for rank in ranks if self._read(f"here/{rank}") is None}

    def leave(self, last: Mapping[str, int]) -> None:
        """Say that nothing comes from this rank after its last step of each kind, so that nobody waits for it."""
        self._store.set(f"left/{self.rank}", json.dumps(last))
        self._store.add("left", 1)

    def find_left(self, kind: str, step: int, ranks: Iterable[int]) -> set[int]:
        """Return those of `ranks` that left before a step; one request if none did."""
        if not int(self._read("left") or 0):
            return set()
        last = {rank: self._read(f"left/{rank}") for rank in ranks}
        return {rank for rank, text in last.items() if text is not None and json.loads(text).get(kind, -1) < step}

    def delete_left(self, comparing: bool) -> None:
        """Delete what `leave` made: this rank's part of it, or what the ranks share."""
        self._store.delete_key("left" if comparing else f"left/{self.rank}")

    def _read(self, key: str) -> bytes | None:
        """Return a key's value, or None where there is none, without waiting for it to come.

        Comparing with a value and replacing it by the same reads; on a missing key it returns what was expected.
        Source: `compareSetHandler` in torch/csrc/distributed/c10d/TCPStoreBackend.cpp.
        """
        value = self._store.compare_set(key, _ABSENT, _ABSENT)
        return None if value == _ABSENT.encode() else value

    def answer(self, question: Question, answer: bytes) -> None:
        """Leave the answer to a question; no bytes where the step was not kept."""
        self._store.set(f"answer/{question.number}/{self.rank}", answer)

    def take_answers(self, question: Question, ranks: Iterable[int]) -> dict[int, bytes]:
        """Return the answers of some ranks, as far as they are there, and delete them."""
        found = {rank: self._read(f"answer/{question.number}/{rank}") for rank in ranks}
        answers = {rank: answer for rank, answer in found.items() if answer is not None}
        for rank in answers:
            self._store.delete_key(f"answer/{question.number}/{rank}")
        return answers


def _name_node(kind: str, step: int, level: int, node: int) -> str:
    return f"{kind}/{step}/{level}/{node}"


def _count_nodes(world_size: int) -> list[int]:
    """Return the number of nodes on each level, leaves first, the root last."""
    sizes = [-(-world_size // FAN_OUT)]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // FAN_OUT))
    return sizes


def compare_details(question: Question, answers: Mapping[int, bytes]) -> DetailsComparison:
    """Compare the answers to a question, name by name."""
    read = {rank: Answer.from_bytes(answer) for rank, answer in sorted(answers.items()) if answer}
    told = {rank: answer for rank, answer in read.items() if answer.details.keys() >= set(question.parts)}
    differing: dict[str, dict[str, dict[int, int | str | float]]] = {}
    for part in question.parts:
        values = _by_name({rank: answer.details[part] for rank, answer in told.items()})
        differing[part] = {
            name: by_rank
            for name, by_rank in values.items()
            if len(by_rank) < len(told) or len(set(map(repr, by_rank.values()))) > 1
        }
    measured = [part for part in question.parts if all(part in answer.measures for answer in told.values())]
    return DetailsComparison(
        question.step,
        ranks=tuple(told),
        missing=tuple(rank for rank in question.ranks if rank not in answers),
        forgotten=tuple(rank for rank in answers if rank not in told),
        differing=differing,
        measures={part: _by_name({rank: a.measures[part] for rank, a in told.items()}) for part in measured},
        facts={rank: answer.facts for rank, answer in told.items()},
    )


def _by_name(values: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[int, Any]]:
    """Turn values by rank and name into values by name and rank."""
    by_name: dict[str, dict[int, Any]] = {}
    for rank, named in values.items():
        for name, value in named.items():
            by_name.setdefault(name, {})[rank] = value
    return by_name
