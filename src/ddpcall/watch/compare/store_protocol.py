"""The ledger: what ranks leave for each other on the store, and what can be read from it.

Per check a rank makes three requests, and one rank in eight makes a fourth, however many ranks there are:

1. read the state, which the comparing rank keeps: attempt, last step that was compared, question about a step;
2. offer its digests as the reference of this step: the first offer stands (`compare_set`), all get it back;
3. add its bits to a counter that it shares with seven others: arrived, and the parts in which it differs from the
   reference. Whoever completes a counter adds the summary to the next level's, so the root tells of all ranks.

Only a rank that differs where replicas should agree leaves its digests too. The comparing rank reads the root, and
below it only what is incomplete or differs. Keys are deleted, by the rank that created them, once compared.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.distributed import Store

from ddpcall.watch.compare.vitals import OWN_PARTS, PARTS, REPLICATED_PARTS, Details, Facts, Vitals

FAN_OUT = 8
MAX_KEPT_STEPS = 64
_BITS = 1 + len(PARTS)  # arrived, and one for each part that differs: 7 × 8 bits fit the store's signed counters
_REPLICATED_BITS = sum(1 << PARTS.index(part) for part in REPLICATED_PARTS)
_ABSENT = "absent"
_MAX_RECORDS = 1024


@dataclass(frozen=True)
class Comparison:
    """What the ranks' vitals of one step say about each other.

    Attributes:
        step: The optimizer step.
        num_ranks: How many ranks' vitals were compared.
        missing: Ranks whose vitals were not there in time: slow, finished, stopped or dead.
        same: Parts that are equal on all the ranks that were compared.
        differing: By replicated part that differs: the groups of ranks that agree with each other, largest first.
        unlike: Own parts (batch, rng) that are not equal on all ranks, as they should be (batch) or may be (rng).
        ungrouped: Ranks known to differ from others, but not who agrees with whom: more than 1,024 differed.
        digests: By replicated part that differs: the digest of each group.
    """

    step: int
    num_ranks: int
    missing: tuple[int, ...]
    same: tuple[str, ...]
    differing: dict[str, tuple[tuple[int, ...], ...]]
    unlike: tuple[str, ...]
    ungrouped: tuple[int, ...] = ()
    digests: dict[str, tuple[int | None, ...]] = field(default_factory=dict, compare=False)


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


@dataclass(frozen=True)
class Question:
    """What the comparing rank asks for: details of `parts` of `step` from `ranks`."""

    number: int
    step: int
    parts: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class State:
    """What the comparing rank tells all others.

    Attributes:
        attempt: Tells its keys from those of an earlier start.
        done: The last step that was compared.
        question: What it asks.
        measure_from: The step from which parameters are to be looked at closely.
        closed: Whether it has left.
    """

    attempt: str
    done: int = -1
    question: Question | None = None
    measure_from: int = sys.maxsize
    closed: bool = False

    def to_json(self) -> str:
        asked = None if self.question is None else list(vars(self.question).values())
        return json.dumps([self.attempt, self.done, asked, self.measure_from, self.closed])

    @staticmethod
    def from_json(text: bytes) -> State:
        attempt, done, asked, measure_from, closed = json.loads(text)
        if asked is not None:
            number, step, parts, ranks = asked
            asked = Question(number, step, tuple(parts), tuple(ranks))
        return State(attempt, done, asked, measure_from, closed)


class Ledger:
    """What ranks leave for each other on the store, request by request; no thread, no waiting.

    Args:
        store: Of this rank's own, so that no other use of it holds requests up.
        rank: This rank.
        world_size: How many ranks there are.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store = store
        self.rank = rank
        self._level_sizes = _count_nodes(world_size)
        self._world_size = world_size
        self._created: deque[tuple[int, str]] = deque()

    def read_state(self) -> State | None:
        """Return what the comparing rank last wrote, or None."""
        text = self._read("state")
        return None if text is None else State.from_json(text)

    def write_state(self, state: State) -> None:
        """Replace the state; for the comparing rank alone."""
        self._store.set("state", state.to_json())

    def post(self, attempt: str, vitals: Vitals) -> None:
        """Leave one step's vitals for the comparing rank."""
        prefix = f"{attempt}/{vitals.step}"
        digests = [vitals.parts.get(part) for part in PARTS]
        offer = json.dumps([self.rank, *digests])
        reference = json.loads(self._store.compare_set(f"{prefix}/first", "", offer))
        if reference[0] == self.rank:
            self._created.append((vitals.step, f"{prefix}/first"))
        differs = sum(1 << i for i, digest in enumerate(digests) if digest != reference[1 + i])
        if differs & _REPLICATED_BITS:
            self._store.set(f"{prefix}/record/{self.rank}", offer)
            self._created.append((vitals.step, f"{prefix}/record/{self.rank}"))
        self._arrive(vitals.step, prefix, 1 | differs << 1)

    def _arrive(self, step: int, prefix: str, bits: int) -> None:
        index = self.rank
        for level, size in enumerate(self._level_sizes):
            node, slot = divmod(index, FAN_OUT)
            key = f"{prefix}/{level}/{node}"
            contribution = bits << _BITS * slot
            value = self._store.add(key, contribution)
            if value == contribution:
                self._created.append((step, key))
            children = _split(value, self._num_children(level, node))
            if size == 1 or not all(child & 1 for child in children):
                return
            bits = _summarize(children)
            index = node

    def _num_children(self, level: int, node: int) -> int:
        below = self._world_size if level == 0 else self._level_sizes[level - 1]
        return min(FAN_OUT, below - node * FAN_OUT)

    def delete_created(self, done: int) -> None:
        """Delete the keys this rank created for steps that were compared, and those that were kept too long."""
        while self._created and (
            self._created[0][0] <= done or len({step for step, _ in self._created}) > MAX_KEPT_STEPS
        ):
            self._store.delete_key(self._created.popleft()[1])

    def delete_step(self, attempt: str, step: int) -> None:
        """Delete all of a step's keys but the records, whoever created them: for the last steps of a run."""
        prefix = f"{attempt}/{step}"
        self._store.delete_key(f"{prefix}/first")
        for level, size in enumerate(self._level_sizes):
            for node in range(size):
                self._store.delete_key(f"{prefix}/{level}/{node}")

    def is_complete(self, attempt: str, step: int) -> bool:
        """Say whether all ranks have left this step's vitals: one request."""
        top = len(self._level_sizes) - 1
        return all(child & 1 for child in self._read_node(f"{attempt}/{step}", top, 0))

    def find_missing(self, attempt: str, step: int) -> list[int]:
        """Return the ranks that have not left this step's vitals; reads only where some have not."""
        top = len(self._level_sizes) - 1
        entries = self._walk(f"{attempt}/{step}", top, 0, lambda bits: not bits & 1)
        return [rank for rank, bits in entries if not bits & 1]

    def announce(self) -> None:
        """Say that this rank is watched, before it has anything to compare."""
        self._store.set(f"here/{self.rank}", "")

    def take_back(self) -> None:
        """Delete the announcement: this rank is no longer watched."""
        self._store.delete_key(f"here/{self.rank}")

    def find_silent(self, ranks: Iterable[int]) -> set[int]:
        """Return those of `ranks` that have not announced themselves: one request for each."""
        return {rank for rank in ranks if self._read(f"here/{rank}") is None}

    def leave(self, attempt: str, step: int) -> None:
        """Say that nothing comes from this rank after a step, so that nobody waits for it."""
        self._store.set(f"{attempt}/left/{self.rank}", str(step))
        self._store.add(f"{attempt}/left", 1)

    def find_left(self, attempt: str, step: int, ranks: Iterable[int] | None = None) -> set[int]:
        """Return those of `ranks` (the missing ones of this step) that left before; one request if none did."""
        if not int(self._read(f"{attempt}/left") or 0):
            return set()
        last = {
            rank: self._read(f"{attempt}/left/{rank}")
            for rank in (self.find_missing(attempt, step) if ranks is None else ranks)
        }
        return {rank for rank, text in last.items() if text is not None and int(text) < step}

    def delete_left(self, attempt: str, comparing: bool) -> None:
        """Delete what `leave` made: this rank's part of it, or what the ranks share."""
        self._store.delete_key(f"{attempt}/left" if comparing else f"{attempt}/left/{self.rank}")

    def compare(self, attempt: str, step: int) -> Comparison:
        """Compare what is there, now."""
        prefix = f"{attempt}/{step}"
        top = len(self._level_sizes) - 1
        entries = list(self._walk(prefix, top, 0, lambda b: not b & 1 or bool(b >> 1 & _REPLICATED_BITS)))
        missing = {rank for rank, bits in entries if rank >= 0 and not bits & 1}
        anywhere = _summarize([bits for _, bits in entries]) >> 1
        deviants = sorted(rank for rank, bits in entries if rank >= 0 and bits >> 1 & _REPLICATED_BITS)
        reference = json.loads(self._read(f"{prefix}/first") or "null")
        grouped, ungrouped = self._group_parts(prefix, reference, missing, deviants) if deviants else ({}, ())
        told = [part for index, part in enumerate(PARTS) if reference and reference[1 + index] is not None]
        return Comparison(
            step=step,
            num_ranks=self._world_size - len(missing),
            missing=tuple(sorted(missing)),
            same=tuple(part for part in told if not anywhere >> PARTS.index(part) & 1),
            differing={part: tuple(groups.values()) for part, groups in grouped.items()},
            unlike=tuple(part for part in OWN_PARTS if anywhere >> PARTS.index(part) & 1),
            ungrouped=ungrouped,
            digests={part: tuple(groups) for part, groups in grouped.items()},
        )

    def _group_parts(
        self, prefix: str, reference: list[int | None], missing: set[int], deviants: list[int]
    ) -> tuple[dict[str, dict[int | None, tuple[int, ...]]], tuple[int, ...]]:
        """Group the ranks by part from the digests that the differing ones left; tell whose were not read."""
        records = {rank: self._read(f"{prefix}/record/{rank}") for rank in deviants[:_MAX_RECORDS]}
        for rank in records:
            self._store.delete_key(f"{prefix}/record/{rank}")
        digests = {rank: json.loads(text)[1:] for rank, text in records.items() if text is not None}
        apart = missing.union(deviants)
        agreeing = [rank for rank in range(self._world_size) if rank not in apart]
        groups = {
            part: _group(agreeing, reference[1 + index], {rank: d[index] for rank, d in digests.items()})
            for index, part in enumerate(REPLICATED_PARTS)
        }
        differing = {part: ranks for part, ranks in groups.items() if len(ranks) > 1}
        return differing, tuple(rank for rank in deviants if rank not in digests)

    def _walk(
        self, prefix: str, level: int, node: int, interesting: Callable[[int], bool]
    ) -> Iterator[tuple[int, int]]:
        """Yield (rank, bits) where it is interesting, and (-1, the summary of a subtree) where it is not."""
        for slot, bits in enumerate(self._read_node(prefix, level, node)):
            below = node * FAN_OUT + slot
            if not interesting(bits):
                yield (-1 if level else below), bits
            elif level:
                yield from self._walk(prefix, level - 1, below, interesting)
            else:
                yield below, bits

    def _read_node(self, prefix: str, level: int, node: int) -> list[int]:
        value = self._read(f"{prefix}/{level}/{node}")
        return _split(int(value or 0), self._num_children(level, node))

    def _read(self, key: str) -> bytes | None:
        """Return a key's value, or None where there is none, without waiting for it to come.

        Comparing with a value and replacing it by the same reads; on a missing key it returns what was expected.
        Source: `compareSetHandler` in torch/csrc/distributed/c10d/TCPStoreBackend.cpp.
        """
        value = self._store.compare_set(key, _ABSENT, _ABSENT)
        return None if value == _ABSENT.encode() else value

    def answer(self, attempt: str, question: Question, answer: Answer | None) -> None:
        """Leave the answer to a question; None where the step was not kept."""
        told = None if answer is None else [answer.details, answer.measures, answer.facts.to_json()]
        text = zlib.compress(json.dumps(told).encode(), 1).hex()
        self._store.set(f"{attempt}/answer/{question.number}/{self.rank}", text)

    def take_answers(self, attempt: str, question: Question) -> dict[int, Answer | None]:
        """Return the answers that are there, by rank."""
        answers: dict[int, Answer | None] = {}
        for rank in question.ranks:
            text = self._read(f"{attempt}/answer/{question.number}/{rank}")
            if text is not None:
                told = json.loads(zlib.decompress(bytes.fromhex(text.decode())))
                answers[rank] = None if told is None else Answer(told[0], told[1], Facts.from_json(told[2]))
        return answers

    def delete_answers(self, attempt: str, question: Question) -> None:
        """Delete the answers to a question."""
        for rank in question.ranks:
            self._store.delete_key(f"{attempt}/answer/{question.number}/{rank}")


def _count_nodes(world_size: int) -> list[int]:
    """Return the number of counters on each level, leaves first, the root last."""
    sizes = [-(-world_size // FAN_OUT)]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // FAN_OUT))
    return sizes


def _split(value: int, num_children: int) -> list[int]:
    return [value >> _BITS * slot & (1 << _BITS) - 1 for slot in range(num_children)]


def _summarize(children: Sequence[int]) -> int:
    """Return one child's bits for the level above: complete, and the parts that differ anywhere below."""
    differs = 0
    for bits in children:
        differs |= bits & ~1
    return differs | 1


def _group(
    agreeing: Iterable[int], reference: int | None, digests: Mapping[int, int | None]
) -> dict[int | None, tuple[int, ...]]:
    """Return the ranks by digest, largest group first."""
    groups: dict[int | None, list[int]] = {reference: list(agreeing)}
    for rank, digest in digests.items():
        groups.setdefault(digest, []).append(rank)
    ordered = {digest: tuple(sorted(ranks)) for digest, ranks in groups.items() if ranks}
    return dict(sorted(ordered.items(), key=lambda group: (-len(group[1]), group[1][0])))


def compare_details(question: Question, answers: Mapping[int, Answer | None]) -> DetailsComparison:
    """Compare the answers to a question, name by name."""
    told = {
        rank: answer
        for rank, answer in sorted(answers.items())
        if answer is not None and answer.details.keys() >= set(question.parts)
    }
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
