"""The ledger: what ranks leave for each other on the store, and what can be read from it.

Per check a rank makes three requests, and one rank in eight makes a fourth, however many ranks there are:

1. read the state, which the comparing rank keeps: attempt, last step that was compared, question for details;
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

from ddpcall.watch.compare.vitals import OWN_PARTS, PARTS, REPLICATED_PARTS, Details, Vitals

FAN_OUT = 8
MAX_KEPT_STEPS = 64
AT_THE_END = sys.maxsize - 1
"""In place of a step: what a rank says of itself when it leaves."""
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
    digests: dict[str, tuple[int | None, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class DetailsComparison:
    """What the second round found, one rank of each group being asked.

    Attributes:
        step: The step the details are of, which comes after that of the comparison that led here.
        ranks: The ranks that answered.
        missing: The ranks that were asked and did not.
        differing: By part, by name of parameter, buffer, module or setting: the value by rank, where they
            differ; a rank that lacks the name is absent.
    """

    step: int
    ranks: tuple[int, ...]
    missing: tuple[int, ...]
    differing: dict[str, dict[str, dict[int, int | str | float]]]


@dataclass(frozen=True)
class Question:
    """What the comparing rank asks for: details of `parts` from `ranks`, at their first vitals from `step` on."""

    number: int
    step: int
    parts: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class State:
    attempt: str
    done: int = -1
    question: Question | None = None
    closed: bool = False

    def to_json(self) -> str:
        asked = self.question
        fields = None if asked is None else [asked.number, asked.step, asked.parts, asked.ranks]
        return json.dumps([self.attempt, self.done, fields, self.closed])

    @staticmethod
    def from_json(text: bytes) -> State:
        attempt, done, fields, closed = json.loads(text)
        if fields is None:
            return State(attempt, done, None, closed)
        number, step, parts, ranks = fields
        return State(attempt, done, Question(number, step, tuple(parts), tuple(ranks)), closed)


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

    def answer(self, attempt: str, question: Question, step: int, details: Mapping[str, Details]) -> None:
        """Leave the answer to a question."""
        self._store.set(f"{attempt}/answer/{question.number}/{self.rank}", _pack([step, details]))

    def take_answers(self, attempt: str, question: Question) -> dict[int, tuple[int, dict[str, Details]]]:
        """Return the answers that are there, by rank: the step and the details."""
        texts = {rank: self._read(f"{attempt}/answer/{question.number}/{rank}") for rank in question.ranks}
        return {rank: tuple(_unpack(text)) for rank, text in texts.items() if text is not None}

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


def _pack(value: Any) -> str:
    return zlib.compress(json.dumps(value).encode(), 1).hex()


def _unpack(text: bytes) -> Any:
    return json.loads(zlib.decompress(bytes.fromhex(text.decode())))


def compare_details(
    question: Question, answers: Mapping[int, tuple[int, dict[str, Details]]]
) -> DetailsComparison:
    """Compare the answers of the step that most ranks answered for; the others count as missing."""
    steps = [step for step, _ in answers.values()]
    step = max(set(steps), key=lambda s: (steps.count(s), s)) if steps else question.step
    told = {rank: details for rank, (its_step, details) in sorted(answers.items()) if its_step == step}
    differing: dict[str, dict[str, dict[int, int | str | float]]] = {}
    for part in question.parts:
        by_name: dict[str, dict[int, int | str | float]] = {}
        for rank, details in told.items():
            for name, value in details.get(part, {}).items():
                by_name.setdefault(name, {})[rank] = value
        differing[part] = {
            name: values
            for name, values in by_name.items()
            if len(values) < len(told) or len(set(map(repr, values.values()))) > 1
        }
    missing = tuple(rank for rank in question.ranks if rank not in told)
    return DetailsComparison(step, tuple(told), missing, differing)
