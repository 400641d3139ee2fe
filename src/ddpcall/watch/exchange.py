"""The exchange: ranks compare their vitals through the store, without a collective and without waiting.

Each rank leaves its vitals on the c10d store, in a thread and over a connection of its own. Per check a rank makes
three requests, and one in seven makes a fourth, however many ranks there are:

1. read the state, which the comparing rank keeps: attempt, last step that was compared, question for details;
2. offer its digests as the reference of this step: the first offer stands (`compare_set`), all get it back;
3. add its bits to a counter that it shares with seven others: arrived, and the parts in which it differs from the
   reference. Whoever completes a counter adds the summary to the next level's, so the root tells of all ranks.

Only a rank that differs where replicas should agree leaves its digests too. The comparing rank reads the root, and
below it only what is incomplete or differs. Keys are deleted, by the rank that created them, once compared.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from ddpcall.watch.vitals import OWN_PARTS, PARTS, REPLICATED_PARTS, Details, Vitals

FAN_OUT = 8
_BITS = 1 + len(PARTS)  # arrived, and one for each part that differs: 7 × 8 bits fit the store's signed counters
_REPLICATED_BITS = sum(1 << PARTS.index(part) for part in REPLICATED_PARTS)
_ABSENT = "absent"
_MAX_RECORDS = 1024
_MAX_ASKED = 16
_MAX_TRIES = 3
_MAX_KEPT_STEPS = 64
_POLL_S = 0.1


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
    """

    step: int
    num_ranks: int
    missing: tuple[int, ...]
    same: tuple[str, ...]
    differing: dict[str, tuple[tuple[int, ...], ...]]
    unlike: tuple[str, ...]
    ungrouped: tuple[int, ...] = ()


@dataclass(frozen=True)
class DetailsComparison:
    """What the second round found, one rank of each group being asked.

    Attributes:
        step: The step the details are of, which comes after that of the comparison that led here.
        ranks: The ranks that answered.
        missing: The ranks that were asked and did not.
        differing: By part, by name of parameter, buffer, module or setting: the value by rank; equal ones left out.
            A rank that lacks the name is absent.
    """

    step: int
    ranks: tuple[int, ...]
    missing: tuple[int, ...]
    differing: dict[str, dict[str, dict[int, int | str | float]]]


@dataclass(frozen=True)
class _Question:
    """What the comparing rank asks for: details of `parts` from `ranks`, at their first vitals from `step` on."""

    number: int
    step: int
    parts: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class _State:
    attempt: str
    done: int = -1
    question: _Question | None = None
    closed: bool = False

    def to_json(self) -> str:
        asked = self.question
        fields = None if asked is None else [asked.number, asked.step, asked.parts, asked.ranks]
        return json.dumps([self.attempt, self.done, fields, self.closed])

    @staticmethod
    def from_json(text: bytes) -> _State:
        attempt, done, fields, closed = json.loads(text)
        if fields is None:
            return _State(attempt, done, None, closed)
        number, step, parts, ranks = fields
        return _State(attempt, done, _Question(number, step, tuple(parts), tuple(ranks)), closed)


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

    def read_state(self) -> _State | None:
        """Return what the comparing rank last wrote, or None."""
        text = self._read("state")
        return None if text is None else _State.from_json(text)

    def write_state(self, state: _State) -> None:
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
            self._created[0][0] <= done or len({step for step, _ in self._created}) > _MAX_KEPT_STEPS
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

    def compare(self, attempt: str, step: int) -> Comparison:
        """Compare what is there, now."""
        prefix = f"{attempt}/{step}"
        top = len(self._level_sizes) - 1
        entries = list(self._walk(prefix, top, 0, lambda b: not b & 1 or bool(b >> 1 & _REPLICATED_BITS)))
        missing = {rank for rank, bits in entries if rank >= 0 and not bits & 1}
        anywhere = _summarize([bits for _, bits in entries]) >> 1
        deviants = sorted(rank for rank, bits in entries if rank >= 0 and bits >> 1 & _REPLICATED_BITS)
        reference = json.loads(self._read(f"{prefix}/first") or "null")
        records = {rank: self._read(f"{prefix}/record/{rank}") for rank in deviants[:_MAX_RECORDS]}
        for rank in records:
            self._store.delete_key(f"{prefix}/record/{rank}")
        digests = {rank: json.loads(text)[1:] for rank, text in records.items() if text is not None}
        ungrouped = set(deviants) - set(digests)
        agreeing = [r for r in range(self._world_size) if r not in missing and r not in set(deviants)]
        differing = {}
        for index, part in enumerate(REPLICATED_PARTS):
            if anywhere >> index & 1:
                differing[part] = _group(agreeing, reference[1 + index], {r: d[index] for r, d in digests.items()})
        told = [part for index, part in enumerate(PARTS) if reference and reference[1 + index] is not None]
        return Comparison(
            step=step,
            num_ranks=self._world_size - len(missing),
            missing=tuple(sorted(missing)),
            same=tuple(part for part in told if not anywhere >> PARTS.index(part) & 1),
            differing=differing,
            unlike=tuple(part for part in OWN_PARTS if anywhere >> PARTS.index(part) & 1),
            ungrouped=tuple(sorted(ungrouped)),
        )

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

    def answer(self, attempt: str, question: _Question, step: int, details: Mapping[str, Details]) -> None:
        """Leave the answer to a question."""
        self._store.set(f"{attempt}/answer/{question.number}/{self.rank}", _pack([step, details]))

    def take_answers(self, attempt: str, question: _Question) -> dict[int, tuple[int, dict[str, Details]]]:
        """Return the answers that are there, by rank: the step and the details."""
        texts = {rank: self._read(f"{attempt}/answer/{question.number}/{rank}") for rank in question.ranks}
        return {rank: tuple(_unpack(text)) for rank, text in texts.items() if text is not None}

    def delete_answers(self, attempt: str, question: _Question) -> None:
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
) -> tuple[tuple[int, ...], ...]:
    groups: dict[int | None, list[int]] = {reference: list(agreeing)}
    for rank, digest in digests.items():
        groups.setdefault(digest, []).append(rank)
    ordered = sorted((sorted(ranks) for ranks in groups.values() if ranks), key=lambda ranks: (-len(ranks), ranks[0]))
    return tuple(tuple(ranks) for ranks in ordered)


def _pack(value: Any) -> str:
    return zlib.compress(json.dumps(value).encode(), 1).hex()


def _unpack(text: bytes) -> Any:
    return json.loads(zlib.decompress(bytes.fromhex(text.decode())))


@dataclass
class _Inbox:
    """What the caller and the thread hand each other, under the condition's lock."""

    vitals: deque[Vitals] = field(default_factory=partial(deque, maxlen=_MAX_KEPT_STEPS))
    answers: deque[tuple[_Question, int, Mapping[str, Details]]] = field(default_factory=deque)
    comparisons: dict[int, Comparison] = field(default_factory=dict)
    details: deque[DetailsComparison] = field(default_factory=deque)
    question: _Question | None = None
    to_ask: tuple[tuple[str, ...], tuple[int, ...], bool] | None = None
    done: int = -1
    hurried: int = 0
    closing: bool = False
    finished: bool = False
    failure: str | None = None


class _Worker:
    """The thread's side: all requests to the store are made here."""

    def __init__(
        self,
        inbox: _Inbox,
        changed: threading.Condition,
        rank: int,
        world_size: int,
        wait_s: float,
        *,
        compares: bool,
    ) -> None:
        self._inbox = inbox
        self._changed = changed
        self._rank = rank
        self._world_size = world_size
        self._wait_s = wait_s
        self._compares = compares
        self._state: _State | None = None
        self._held: deque[tuple[float, Vitals]] = deque(maxlen=_MAX_KEPT_STEPS)
        self._pending: deque[tuple[int, float]] = deque()
        self._published: deque[int] = deque(maxlen=2)
        self._known_missing: set[int] = set()
        self._compared: deque[int] = deque(maxlen=4)
        self._answers_due: float | None = None
        self._tries = 0
        # Many ranks that look often would keep the store busy.
        self._least_pause_s = max(0.002, world_size * 5e-5)

    def run(self, store: Store) -> None:
        """Serve until closed. The thread's target: what goes wrong is noted, and ends it."""
        try:
            own = PrefixStore("ddpcall/exchange", _open_own(store, self._wait_s))
            self._serve(Ledger(own, self._rank, self._world_size))
        except Exception as error:  # noqa: BLE001 (the store is gone, late or full: whatever it was, it is no more)
            self._inbox.failure = f"{type(error).__name__}: {error}"
        finally:
            with self._changed:
                self._inbox.finished = True
                self._changed.notify_all()

    def _serve(self, ledger: Ledger) -> None:
        if self._compares:
            self._write(ledger, _State(secrets.token_hex(8)))
        pause_s = self._least_pause_s
        while True:
            with self._changed:
                woken = self._changed.wait_for(self._has_work, self._choose_pause(pause_s))
                self._held.extend((time.monotonic(), vitals) for vitals in self._inbox.vitals)
                self._inbox.vitals.clear()
                answers = list(self._inbox.answers)
                self._inbox.answers.clear()
                closing = self._inbox.closing
            pause_s = self._least_pause_s if woken else min(2 * pause_s, max(_POLL_S, self._least_pause_s))
            self._follow(ledger)
            self._publish_held(ledger)
            for question, step, details in answers:
                if self._state is not None:
                    ledger.answer(self._state.attempt, question, step, details)
            if self._compares:
                self._compare_pending(ledger)
                self._collect_answers(ledger)
                self._ask(ledger)
            if closing:
                return self._leave(ledger)

    def _has_work(self) -> bool:
        inbox = self._inbox
        return bool(inbox.vitals or inbox.answers or inbox.to_ask or inbox.closing)

    def _choose_pause(self, pause_s: float) -> float | None:
        """Return the seconds until the store is to be looked at without being told to, or None."""
        expecting = self._inbox.hurried or self._pending or self._held or self._answers_due is not None
        return pause_s if expecting else None

    def _write(self, ledger: Ledger, state: _State) -> None:
        ledger.write_state(state)
        self._tell(state)

    def _tell(self, state: _State | None) -> None:
        self._state = state
        with self._changed:
            self._inbox.done = -1 if state is None else state.done
            self._inbox.question = None if state is None else state.question
            self._changed.notify_all()

    def _follow(self, ledger: Ledger) -> None:
        """Read the state; forget what was left for an earlier attempt, delete what was compared."""
        if self._compares:
            state = self._state
        else:
            state = ledger.read_state()
            if self._state and (state is None or state.closed or state.attempt != self._state.attempt):
                ledger.delete_created(sys.maxsize)
            self._tell(None if state is None or state.closed else state)
        if state is not None:
            ledger.delete_created(state.done)

    def _publish_held(self, ledger: Ledger) -> None:
        """Publish in order; without a state there is nobody to publish for, yet."""
        while self._held and self._state is not None:
            _, vitals = self._held.popleft()
            if vitals.step > self._state.done:
                ledger.post(self._state.attempt, vitals)
                self._published.append(vitals.step)
                if self._compares:
                    self._pending.append((vitals.step, time.monotonic()))
        while self._held and time.monotonic() - self._held[0][0] > self._wait_s:
            self._held.popleft()

    def _compare_pending(self, ledger: Ledger) -> None:
        assert self._state is not None
        found: list[Comparison] = []
        attempt = self._state.attempt
        while self._pending and self._is_ready(ledger, attempt, *self._pending[0]):
            step, _ = self._pending.popleft()
            found.append(ledger.compare(attempt, step))
            self._known_missing = set(found[-1].missing)
            self._compared.append(step)
        if found:
            with self._changed:
                for comparison in found:
                    self._inbox.comparisons[comparison.step] = comparison
                for step in sorted(self._inbox.comparisons)[:-_MAX_KEPT_STEPS]:
                    del self._inbox.comparisons[step]
            self._write(ledger, replace(self._state, done=found[-1].step))

    def _is_ready(self, ledger: Ledger, attempt: str, step: int, since: float) -> bool:
        """Say whether nobody is to be waited for: all are there, it is late, or the rest was missing before."""
        if time.monotonic() - since >= self._wait_s or ledger.is_complete(attempt, step):
            return True
        return bool(self._known_missing) and self._known_missing >= set(ledger.find_missing(attempt, step))

    def _ask(self, ledger: Ledger) -> None:
        with self._changed:
            to_ask, self._inbox.to_ask = self._inbox.to_ask, None
        if to_ask is not None and self._published:
            parts, ranks, now = to_ask
            self._tries = _MAX_TRIES if now else 1
            self._put_question(ledger, self._published[-1] if now else self._later(self._published[-1]), parts, ranks)

    def _later(self, step: int) -> int:
        """Return the step three intervals after: by then every rank has read the state."""
        interval = self._published[-1] - self._published[0] if len(self._published) == 2 else 1
        return step + 3 * interval

    def _put_question(self, ledger: Ledger, step: int, parts: tuple[str, ...], ranks: tuple[int, ...]) -> None:
        assert self._state is not None
        previous = self._state.question
        number = 1 if previous is None else previous.number + 1
        self._answers_due = None
        self._write(ledger, replace(self._state, question=_Question(number, step, parts, ranks)))

    def _collect_answers(self, ledger: Ledger) -> None:
        """Take the answers once all are there, or late; ask again where they are of different steps."""
        assert self._state is not None
        question = self._state.question
        if question is None or not self._published or self._published[-1] < question.step or self._tries == 0:
            return
        if self._answers_due is None:
            self._answers_due = time.monotonic() + self._wait_s
        answers = ledger.take_answers(self._state.attempt, question)
        if len(answers) < len(question.ranks) and time.monotonic() < self._answers_due:
            return
        self._answers_due = None
        ledger.delete_answers(self._state.attempt, question)
        steps = [step for step, _ in answers.values()]
        if len(set(steps)) > 1 and self._tries < _MAX_TRIES:
            self._tries += 1
            self._put_question(ledger, self._later(max(steps)), question.parts, question.ranks)
            return
        self._tries = 0
        with self._changed:
            self._inbox.details.append(_compare_details(question, answers))
            self._changed.notify_all()

    def _leave(self, ledger: Ledger) -> None:
        if self._compares and self._state is not None:
            ledger.write_state(replace(self._state, done=sys.maxsize, question=None, closed=True))
            ledger.delete_created(sys.maxsize)
            for step in self._compared:
                ledger.delete_step(self._state.attempt, step)


def _compare_details(question: _Question, answers: Mapping[int, tuple[int, dict[str, Details]]]) -> DetailsComparison:
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


def _open_own(store: Store, wait_s: float) -> Store:
    """Return a connection of our own to the same store, none of whose requests takes longer than `wait_s`."""
    own = store.clone()
    if own is not store:
        own.set_timeout(timedelta(seconds=wait_s))
    return own


def find_store(wait_s: float = 10.0) -> Store | None:
    """Return the store all ranks share: the agent's under torchrun, else the default process group's, else None.

    Args:
        wait_s: Seconds to wait for the agent.

    The agent's outlives every rank; the default group's ends with rank 0, where that rank holds it.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=wait_s)
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return dist.distributed_c10d._get_default_store() if dist.is_initialized() else None


class Exchange:
    """Compares the vitals of all ranks, late and without holding any of them up.

    Nothing here runs a collective, and `publish`, `asked`, `post_details` and `compare` do not touch the network: a
    thread does, over a connection of its own. When the store fails, `failure` says how and nothing more is compared.

    Args:
        store: The agent's store, or the default process group's; cloned, so its owner is not disturbed.
        rank: This rank.
        world_size: How many ranks there are.
        wait_s: Seconds that a step waits for ranks that are late, and any call for the store. Ranks found missing
            are not waited for again until they are back.
        comparer: The rank that compares; the others only publish.

    Blind to: what the comparing rank has no time to see: it must not be the first to die. Ranks that see the state
    of an earlier attempt (a restart) before the comparing rank has replaced it publish their first step in vain.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, *, wait_s: float = 10.0, comparer: int = 0
    ) -> None:
        self._rank = rank
        self._wait_s = wait_s
        self._compares = rank == comparer
        self._inbox = _Inbox()
        self._changed = threading.Condition()
        self._answered = -1
        self._last_step = -1
        worker = _Worker(self._inbox, self._changed, rank, world_size, wait_s, compares=self._compares)
        self._thread = threading.Thread(target=worker.run, args=(store,), name="ddpcall exchange", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def failure(self) -> str | None:
        """Why nothing is compared any more, or None."""
        return self._inbox.failure

    def publish(self, vitals: Vitals) -> None:
        """Hand this rank's vitals of one step to the thread.

        Raises:
            ValueError: The step is not later than the last one.
        """
        if vitals.step <= self._last_step:
            raise ValueError(f"vitals of step {vitals.step} were published after those of step {self._last_step}")
        self._last_step = vitals.step
        with self._changed:
            self._inbox.vitals.append(vitals)
            self._changed.notify_all()

    def compare(self, step: int, *, wait: bool = False) -> Comparison | None:
        """Return the comparison of a step, once; None while ranks are missing that may still come.

        Args:
            step: A step that was published; ask one interval later, so that nobody waits.
            wait: Wait until the comparison is there, for at most twice `wait_s`: at the end of a run.

        Returns:
            None for ever on ranks other than the comparing one, after a failure, and for steps never published.
        """
        with self._changed:
            if wait and self._compares:
                self._await(lambda: step in self._inbox.comparisons, 2 * self._wait_s)
            return self._inbox.comparisons.pop(step, None)

    def comparisons(self) -> list[Comparison]:
        """Return all comparisons not yet taken, oldest first, each once."""
        with self._changed:
            taken = [self._inbox.comparisons.pop(step) for step in sorted(self._inbox.comparisons)]
        return taken

    def ask_details(self, comparison: Comparison, *, now: bool = False) -> None:
        """Ask one rank of each group for the details of the parts that differ; for the comparing rank.

        A question replaces the one before. The ranks answer at their first vitals three intervals from now, when
        all of them know of it; with `now`, at the end of a run, at once with what they have.
        """
        ranks = sorted({group[0] for groups in comparison.differing.values() for group in groups})[:_MAX_ASKED]
        with self._changed:
            self._inbox.to_ask = (tuple(comparison.differing), tuple(ranks), now)
            self._changed.notify_all()

    def asked(self, step: int, *, wait: bool = False) -> tuple[str, ...]:
        """Return the parts whose details this rank should post at this step; usually none.

        Args:
            step: The step whose vitals were just published.
            wait: Wait for the comparing rank to be done with this step, or to ask, at most `wait_s`: at the end of
                a run.
        """
        with self._changed:
            if wait:
                self._await(lambda: self._is_asked(step) or self._inbox.done >= step, self._wait_s)
            return self._inbox.question.parts if self._is_asked(step) and self._inbox.question else ()

    def _is_asked(self, step: int) -> bool:
        question = self._inbox.question
        return (
            question is not None
            and question.number > self._answered
            and self._rank in question.ranks
            and step >= question.step
        )

    def post_details(self, step: int, details: Mapping[str, Details]) -> None:
        """Answer the question: the details, by part, that this rank has at this step."""
        with self._changed:
            if self._inbox.question is None:
                return
            self._answered = self._inbox.question.number
            self._inbox.answers.append((self._inbox.question, step, details))
            self._changed.notify_all()

    def details(self, *, wait: bool = False) -> DetailsComparison | None:
        """Return what came of a question, once; None until its answers are there or `wait_s` has passed."""
        with self._changed:
            if wait and self._compares:
                self._await(lambda: bool(self._inbox.details), 2 * self._wait_s)
            return self._inbox.details.popleft() if self._inbox.details else None

    def close(self) -> None:
        """Publish what is left, delete the keys and end the thread; returns within `wait_s`, whatever happens."""
        atexit.unregister(self.close)
        with self._changed:
            self._inbox.closing = True
            self._changed.notify_all()
        self._thread.join(self._wait_s)

    def _await(self, is_there: Callable[[], bool], seconds: float) -> None:
        """Wait under the lock, while the thread looks more often."""
        self._inbox.hurried += 1
        self._changed.notify_all()
        self._changed.wait_for(lambda: is_there() or self._inbox.finished, seconds)
        self._inbox.hurried -= 1
