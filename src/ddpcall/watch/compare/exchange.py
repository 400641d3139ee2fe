"""The exchange: ranks compare their vitals through the store, without a collective and without waiting.

What a rank leaves on the store, and what the comparing rank makes of it, is in `store_protocol`. Here is the
thread that does it, so that no request holds the training up, and what the two hand each other.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed import Store, TCPStore

from ddpcall import torch_internals as internals
from ddpcall.launch_environment import has_agent_store, read_address
from ddpcall.watch.compare.store_protocol import (
    MAX_KEPT_STEPS,
    Answer,
    Comparison,
    DetailsComparison,
    Question,
    RankStore,
    State,
    compare_details,
)
from ddpcall.watch.compare.vitals import AT_THE_END, GRADIENTS, REPLICAS, Vitals

__all__ = ["Comparison", "DetailsComparison", "Exchange", "RunExchange", "find_store"]

WAIT_S = 15.0
_MAX_ASKED = 16
_KEPT_VITALS = 8
_POLL_S = 0.1
_CONNECT_S = 30.0  # a busy machine takes seconds to answer, however short the wait for a late rank is
_ANNOUNCE_S = 1.0


@dataclass
class _Asked:
    """A question that was put, and what has come of it; where nobody is asked, the answer is known.

    Attributes:
        num_posted: How many vitals the comparing rank had posted when it was put.
        vitals: The comparing rank's, of measured gradients, with what their comparison said.
    """

    question: Question
    put_s: float
    num_posted: int
    vitals: tuple[Vitals, Comparison] | None = None
    due_s: float | None = None
    answers: dict[int, bytes] = field(default_factory=dict)
    is_closed: bool = False


@dataclass
class _Inbox:
    """What the caller and the thread hand each other, under the condition's lock."""

    vitals: deque[Vitals] = field(default_factory=partial(deque, maxlen=2 * MAX_KEPT_STEPS))
    comparisons: dict[int, Comparison] = field(default_factory=dict)
    to_ask: deque[tuple[int, tuple[str, ...], tuple[int, ...]]] = field(default_factory=deque)
    details: deque[DetailsComparison] = field(default_factory=deque)
    judged: deque[tuple[int, Any]] = field(default_factory=deque)
    to_measure_from: int = sys.maxsize
    state: State = field(default_factory=State)
    compared: int = -1
    judged_to: int = -1
    hurried: int = 0
    last: Mapping[str, int] | None = None
    closing: bool = False
    connected: bool = False
    finished: bool = False
    failure: str | None = None


@dataclass
class _Worker:
    """The thread's side: all requests to the store are made here."""

    inbox: _Inbox
    changed: threading.Condition
    ranks: RankStore
    wait_s: float
    compares: bool
    _state: State | None = None
    _held: deque[tuple[float, Vitals]] = field(default_factory=partial(deque, maxlen=2 * MAX_KEPT_STEPS))
    _pending: dict[str, deque[tuple[float, Vitals]]] = field(default_factory=partial(defaultdict, deque))
    _kept: dict[str, dict[int, Vitals]] = field(default_factory=partial(defaultdict, dict))
    _num_posted: int = 0
    _known_missing: set[int] = field(default_factory=set)
    _compared: deque[tuple[str, int]] = field(default_factory=partial(deque, maxlen=8))
    _done: dict[str, int] = field(default_factory=dict)
    _answered: int = 0
    _num_questions: int = 0
    _asked: dict[str, deque[_Asked]] = field(default_factory=partial(defaultdict, deque))
    _looking: bool = False
    _hurries: bool = False
    _has_left: bool = False

    def run(self, store: Store) -> None:
        """Serve until closed. The thread's target: what goes wrong is noted, and ends it."""
        try:
            self.ranks.connect(store, self.wait_s)
            with self.changed:
                self.inbox.connected = True
                self.changed.notify_all()
            self._serve()
        except Exception as error:  # the store is gone or late; whatever it was, the training goes on without
            self.inbox.failure = _say(error)
        finally:
            with self.changed:
                self.inbox.finished = True
                self.changed.notify_all()

    def _serve(self) -> None:
        if self.compares:
            self._write(State())
        # Many ranks that look often would keep the store busy.
        pause_s = least_pause_s = max(0.002, self.ranks.world_size * 5e-5)
        while True:
            with self.changed:
                # Asleep without a limit, it must be woken when somebody begins to wait.
                self._looking, self._hurries = self._is_expecting(), bool(self.inbox.hurried)
                woken = self.changed.wait_for(self._has_work, pause_s if self._looking else None)
                self._held.extend((time.monotonic(), vitals) for vitals in self.inbox.vitals)
                self.inbox.vitals.clear()
                closing = self.inbox.closing
            pause_s = least_pause_s if woken else min(2 * pause_s, max(self._longest_pause_s(), least_pause_s))
            if not self.compares:
                self._tell(self.ranks.read_state())
            if self._state is not None:
                self.ranks.delete_created(self._state.done)
            self._post_held()
            self._answer()
            self._tell_of_leaving()
            if self.compares:
                self._compare_pending()
                self._ask()
                self._collect_answers()
                self._tell_news()
            if closing:
                return self._leave()

    def _has_work(self) -> bool:
        inbox = self.inbox
        is_leaving = inbox.last is not None and not self._has_left
        news = inbox.vitals or inbox.closing or inbox.to_ask or is_leaving
        return bool(news or (inbox.hurried and not (self._looking and self._hurries)))

    def _is_expecting(self) -> bool:
        """Say whether the store is to be looked at without being told to."""
        is_due = any(each.due_s is not None for asked in self._asked.values() for each in asked)
        return bool(self.inbox.hurried or any(self._pending.values()) or self._held or is_due)

    def _longest_pause_s(self) -> float:
        """Return how long to sleep at most: a rank that is late for long is looked for less and less often."""
        since = [pending[0][0] for pending in self._pending.values() if pending]
        return _POLL_S if self._hurries or not since else max(_POLL_S, (time.monotonic() - max(since)) / 4)

    def _write(self, state: State) -> None:
        self.ranks.write_state(state)
        self._tell(state)

    def _tell(self, state: State | None) -> None:
        if state is None:
            return
        self._state = state
        with self.changed:
            self.inbox.state = state
            self.changed.notify_all()

    def _post_held(self) -> None:
        """Post in order; without a state there is nobody to post for, yet."""
        while self._held and self._state is not None:
            since, vitals = self._held.popleft()
            if vitals.step <= self._state.done.get(vitals.kind, -1):
                continue
            self.ranks.post(vitals)
            self._num_posted += 1
            kept = self._kept[vitals.kind]
            kept[vitals.step] = vitals
            if len(kept) > (_KEPT_VITALS if vitals.kind == REPLICAS else MAX_KEPT_STEPS):
                del kept[min(kept)]
            if self.compares:
                self._pending[vitals.kind].append((since, vitals))
        while self._held and time.monotonic() - self._held[0][0] > self.wait_s:
            self._held.popleft()

    def _tell_of_leaving(self) -> None:
        if self.inbox.last is not None and not self._has_left:
            self._has_left = True
            self.ranks.leave(self.inbox.last)

    def _answer(self) -> None:
        """Answer questions about the last steps, whose vitals are kept."""
        if self._state is None:
            return
        for question in self._state.questions:
            if question.number > self._answered and self.ranks.rank in question.ranks:
                vitals = self._kept[question.kind].get(question.step)
                self.ranks.answer(question, b"" if vitals is None else _tell(vitals, question))
            self._answered = max(self._answered, question.number)
        kept, done = self._kept[GRADIENTS], self._state.done.get(GRADIENTS, -1)
        for step in [step for step in kept if step <= done]:  # what is not asked for by now never is
            del kept[step]

    # ---- the comparing rank -----------------------------------------------------------------------------------

    def _compare_pending(self) -> None:
        for kind, pending in self._pending.items():
            while pending and self._is_ready(kind, *pending[0]):
                vitals = pending.popleft()[1]
                comparison = self.ranks.compare(kind, vitals.step)
                self._compared.append((kind, vitals.step))
                self._done[kind] = vitals.step
                if kind == GRADIENTS:
                    # Asked at once: the others keep a record until they read that its step is done.
                    self._put(vitals.step, (), tuple(vitals.choose(comparison)), kind, (vitals, comparison))
                else:
                    self._known_missing = set(comparison.missing)
                    self._hand_over(comparison)

    def _hand_over(self, comparison: Comparison) -> None:
        with self.changed:
            self.inbox.comparisons[comparison.step] = comparison
            self.inbox.compared = comparison.step
            for step in sorted(self.inbox.comparisons)[:-MAX_KEPT_STEPS]:
                del self.inbox.comparisons[step]
            self.changed.notify_all()

    def _is_ready(self, kind: str, since: float, vitals: Vitals) -> bool:
        """Say whether nobody is to be waited for: all are there, it is late, the rest left, was missing or silent.

        Ranks announce themselves when they wrap a model, which they all do together: one that has not is not
        watched, and never comes. Nor does one that has posted a later step: a step may be measured on one rank
        alone, where its sensors saw something.
        """
        waited_s = time.monotonic() - since
        if waited_s >= self.wait_s or self.ranks.is_complete(kind, vitals.step):
            return True
        missing = set(self.ranks.compare(kind, vitals.step).missing)
        gone = self.ranks.find_left(kind, vitals.step, missing)
        if kind == REPLICAS:
            gone |= self._known_missing
        later = [each.step for _, each in self._pending[kind]][1:]
        for step in {*later[:1], *later[-1:]}:
            gone |= missing - set(self.ranks.compare(kind, step).missing)
        if waited_s >= _ANNOUNCE_S and not gone >= missing:
            gone |= self.ranks.find_silent(missing - gone)
        return gone >= missing

    def _ask(self) -> None:
        with self.changed:
            to_ask = list(self.inbox.to_ask)
            self.inbox.to_ask.clear()
        for each in to_ask:
            self._put(*each, REPLICAS)

    def _put(
        self,
        step: int,
        parts: tuple[str, ...],
        ranks: tuple[int, ...],
        kind: str,
        vitals: tuple[Vitals, Comparison] | None = None,
    ) -> None:
        self._num_questions += 1
        question = Question(self._num_questions, step, parts, ranks, kind)
        self._asked[kind].append(_Asked(question, time.monotonic(), self._num_posted, vitals))

    def _collect_answers(self) -> None:
        """Take the answers once all are there, or late; hand them over in the order of the questions."""
        for asked in self._asked.values():
            for each in asked:
                each.is_closed = each.is_closed or self._is_answered(each)
            while asked and asked[0].is_closed:
                each = asked.popleft()
                told = self._judge(each) if each.vitals else compare_details(each.question, each.answers)
                with self.changed:
                    if isinstance(told, DetailsComparison):
                        self.inbox.details.append(told)
                    else:
                        self.inbox.judged.append((each.question.step, told))
                        self.inbox.judged_to = each.question.step
                    self.changed.notify_all()

    def _judge(self, asked: _Asked) -> Any:
        """Return what becomes of measured gradients: an error, too, is the caller's."""
        assert asked.vitals is not None
        vitals, comparison = asked.vitals
        try:
            return vitals.judge(comparison, asked.answers)
        except Exception as error:
            return error

    def _is_answered(self, each: _Asked) -> bool:
        """Say whether all have answered that will; ranks read a question when they post again, or leave."""
        awaited = set(each.question.ranks) - each.answers.keys()
        if not awaited:
            return True
        now_s = time.monotonic()
        if each.due_s is None and (self.inbox.hurried or self._num_posted > each.num_posted):
            each.due_s = now_s + self.wait_s
        each.answers |= self.ranks.take_answers(each.question, awaited)
        awaited -= each.answers.keys()
        if not awaited or (each.due_s is not None and now_s >= each.due_s):
            return True
        return now_s - each.put_s >= _ANNOUNCE_S and self.ranks.find_silent(awaited) == awaited

    def _tell_news(self) -> None:
        """Tell all ranks what was compared, what is asked, and from which step on tensors are measured."""
        is_open = [each.question for asked in self._asked.values() for each in asked if not each.is_closed]
        is_open.sort(key=lambda question: question.number)  # as they are answered
        state = State(dict(self._done), tuple(is_open), self.inbox.to_measure_from)
        if state != self._state:
            self._write(state)
            self._answer()

    def _leave(self) -> None:
        self.ranks.take_back()
        if self.compares:
            all_done = dict.fromkeys(self._pending, sys.maxsize)
            self.ranks.write_state(State(all_done, closed=True))
            self.ranks.delete_created(all_done)
            for kind, step in self._compared:
                self.ranks.delete_step(kind, step)
            self.ranks.delete_left(comparing=True)
        elif self._has_left and self.inbox.state.closed:
            self.ranks.delete_left(comparing=False)


def _tell(vitals: Vitals, question: Question) -> bytes:
    return vitals.record() if vitals.kind == GRADIENTS else Answer.of(vitals, question.parts).to_bytes()


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def find_store() -> Store | None:
    """Return the store all ranks share: the agent's under torchrun, else the default process group's, else None.

    Raises:
        torch.distributed.DistError: The agent does not answer within 30 s.

    The agent's outlives every rank; the default group's ends with rank 0, where that rank holds it.
    """
    if has_agent_store():
        host, port = read_address()
        timeout = timedelta(seconds=_CONNECT_S)
        return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)
    return internals.GET_DEFAULT_STORE.get()() if dist.is_initialized() else None


class Exchange:
    """Compares the vitals of all ranks, late and without holding any of them up.

    Nothing here runs a collective, and `publish`, `ask` and `compare` do not touch the network:
    a thread does, over a connection of its own. When the store fails, `failure` says how and no more is compared.

    Args:
        store: The agent's store, or the default process group's; cloned, so its owner is not disturbed.
        rank: This rank.
        world_size: How many ranks there are.
        wait_s: Seconds that a step waits for ranks that are late, and any call for the store. Ranks found missing
            are not waited for again until they are back.
        comparer: The rank that compares; the others only publish.

    Attributes:
        compares: Whether this rank does.

    Blind to: what the comparing rank has no time to see: it must not be the first to die. Ranks that did not all
    begin as many watches on this store are not watched together.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, *, wait_s: float = 10.0, comparer: int = 0
    ) -> None:
        self._rank = rank
        self._wait_s = wait_s
        self.compares = rank == comparer
        self._inbox = _Inbox()
        self._changed = threading.Condition()
        self._last: dict[str, int] = {}
        self._process = os.getpid()
        ranks = RankStore(store, rank, world_size)
        worker = _Worker(self._inbox, self._changed, ranks, wait_s, self.compares)
        self._thread = threading.Thread(target=worker.run, args=(store,), name="ddpcall exchange", daemon=True)
        try:
            # At once: a connection of its own takes seconds where names are looked up slowly, and a rank that has
            # not announced itself by then is taken for one that is not watched.
            ranks.begin()
        except Exception as error:
            self._inbox.failure, self._inbox.finished = _say(error), True
            return
        self._thread.start()
        atexit.register(self.close)

    @property
    def failure(self) -> str | None:
        """Why nothing is compared any more, or None."""
        return self._inbox.failure

    @property
    def has_compared(self) -> bool:
        """Whether the comparing rank has compared replicas, as far as this rank knows."""
        return self._inbox.state.done.get(REPLICAS, -1) >= 0

    @property
    def is_here(self) -> bool:
        """Whether the thread is in this process: not in one that was forked since."""
        return os.getpid() == self._process

    def publish(self, vitals: Vitals) -> None:
        """Hand this rank's vitals of one step to the thread.

        Raises:
            ValueError: The step is not later than the last one of its kind.
        """
        last = self._last.get(vitals.kind, -1)
        if vitals.step <= last:
            raise ValueError(f"vitals of step {vitals.step} were published after those of step {last}")
        self._last[vitals.kind] = vitals.step
        with self._changed:
            self._inbox.vitals.append(vitals)
            self._changed.notify_all()

    def compare(self, step: int, *, wait: bool = False, wait_s: float | None = None) -> Comparison | None:
        """Return the comparison of a step's replicas, once; None while ranks are missing that may still come.

        Args:
            step: A step that was published; ask one interval later, so that nobody waits.
            wait: Wait until the comparison is there: at the end of a run.
            wait_s: For at most so many seconds; twice the exchange's own by default.

        Returns:
            None for ever on ranks other than the comparing one, after a failure, and for steps never published.
        """
        with self._changed:
            if wait and self.compares:
                # It may have been taken already, by `comparisons`.
                self._await(lambda: self._inbox.compared >= step, wait_s)
            return self._inbox.comparisons.pop(step, None)

    def comparisons(self) -> list[Comparison]:
        """Return all comparisons of replicas not yet taken, oldest first, each once."""
        with self._changed:
            return [self._inbox.comparisons.pop(step) for step in sorted(self._inbox.comparisons)]

    def judged(self, *, wait: bool = False) -> list[tuple[int, Any]]:
        """Return measured steps and what `Vitals.judge` made of them, or its error; each once, oldest first.

        Args:
            wait: Wait for the last one that was published: at the end of a run.
        """
        last = self._last.get(GRADIENTS, -1)
        with self._changed:
            if wait and self.compares:
                self._await(lambda: self._inbox.judged_to >= last)
            found = list(self._inbox.judged)
            self._inbox.judged.clear()
        return found

    def measure_from(self, step: int) -> None:
        """Let all ranks look at their parameters closely, from a step on; for the comparing rank."""
        with self._changed:
            self._inbox.to_measure_from = step

    def measures(self, step: int) -> bool:
        """Say whether parameters are to be looked at closely in this step."""
        return step >= self._inbox.state.measure_from

    def ask(self, comparison: Comparison, *, at: int | None = None) -> None:
        """Ask one rank of each group what the parts that differ are made of; for the comparing rank.

        Args:
            comparison: What differs, and whom to ask.
            at: The step to ask about, where it is not that of the comparison.

        The threads answer, for the same step, from what they kept of the last few, in the order of the questions.
        """
        ranks = sorted({group[0] for groups in comparison.differing.values() for group in groups})[:_MAX_ASKED]
        with self._changed:
            self._inbox.to_ask.append(
                (comparison.step if at is None else at, tuple(comparison.differing), tuple(ranks))
            )
            self._changed.notify_all()

    def details(self, *, wait: bool = False) -> DetailsComparison | None:
        """Return what came of the oldest question, once; None until its answers are there, or late."""
        with self._changed:
            if wait and self.compares:
                self._await(lambda: bool(self._inbox.details))
            return self._inbox.details.popleft() if self._inbox.details else None

    def leave(self, last_words: Vitals | None = None) -> None:
        """Say that no further step is published, so that the comparing rank does not wait for it.

        Args:
            last_words: What this rank leaves with, in place of a step.
        """
        with self._changed:
            if not self.compares:
                self._inbox.last = dict(self._last)
            if last_words is not None:
                self._inbox.vitals.append(last_words)
            self._changed.notify_all()

    def serve(self) -> None:
        """After `leave`: answer until the comparing rank closes or goes on, at most twice `wait_s`."""
        with self._changed:
            self._await(lambda: self._inbox.state.closed or self._is_let_go())

    def _is_let_go(self) -> bool:
        """Say whether the comparing rank has no more to ask: it goes on with replicas, and has measured all."""
        done, last = self._inbox.state.done, self._last
        goes_on = REPLICAS not in last or last[REPLICAS] < done.get(REPLICAS, -1) < AT_THE_END
        return goes_on and last.get(GRADIENTS, -1) <= done.get(GRADIENTS, -1)

    def close(self) -> None:
        """Publish what is left, delete the keys and end the thread; returns within `wait_s`, whatever happens."""
        atexit.unregister(self.close)
        if not self.is_here or not self._thread.ident:  # forked: the thread may have held the lock
            return
        with self._changed:
            self._inbox.closing = True
            self._changed.notify_all()
        self._thread.join(self._wait_s)

    def _await(self, is_there: Callable[[], bool], seconds: float | None = None) -> None:
        """Wait under the lock, twice `wait_s` by default, while the thread looks more often.

        The time runs from when the thread is connected: where names are looked up slowly that alone takes seconds.
        """
        self._changed.wait_for(lambda: self._inbox.connected or self._inbox.finished, _CONNECT_S)
        self._inbox.hurried += 1
        self._changed.notify_all()
        seconds = 2 * self._wait_s if seconds is None else seconds
        self._changed.wait_for(lambda: is_there() or self._inbox.finished, seconds)
        self._inbox.hurried -= 1


class RunExchange:
    """The one exchange of a watched run: begun when it is first needed, so that this rank is known to be watched.

    Attributes:
        trouble: Why nothing is compared, or no more; empty where nothing went wrong.
    """

    def __init__(self) -> None:
        self._exchange: Exchange | None = None
        self._trouble = ""

    @property
    def trouble(self) -> str:
        """Why nothing is compared, or nothing more."""
        failure = None if self._exchange is None else self._exchange.failure
        return failure or self._trouble

    def begin(self) -> Exchange | None:
        """Return the exchange; None where the ranks share no store."""
        if self._exchange is None and not self._trouble:
            try:
                store = find_store()
                self._trouble = "" if store else "there is no store that all ranks share"
            except dist.DistError as error:
                store, self._trouble = None, _say(error)
            if store is not None:
                self._exchange = Exchange(store, dist.get_rank(), dist.get_world_size(), wait_s=WAIT_S)
        return self.current()

    def current(self) -> Exchange | None:
        """Return the exchange that was begun in this process."""
        return self._exchange if self._exchange is not None and self._exchange.is_here else None

    def end(self) -> None:
        """Close it."""
        self._trouble = self.trouble
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.close()
