"""The exchange: ranks compare their vitals through the store, without a collective and without waiting.

What a rank leaves on the store, and what the comparing rank makes of it, is in `store_protocol`. Here is the
thread that does it, so that no request holds the training up, and what the two hand each other.
"""

from __future__ import annotations

import atexit
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from ddpcall import torch_internals as internals
from ddpcall.watch.compare.store_protocol import (
    MAX_KEPT_STEPS,
    Answer,
    Comparison,
    DetailsComparison,
    Ledger,
    Question,
    State,
    compare_details,
)
from ddpcall.watch.compare.vitals import AT_THE_END, Vitals

__all__ = ["Comparison", "DetailsComparison", "Exchange", "find_store"]

_MAX_ASKED = 16
_KEPT_VITALS = 8
_POLL_S = 0.1
_CONNECT_S = 30.0
_ANNOUNCE_S = 1.0


@dataclass
class _Inbox:
    """What the caller and the thread hand each other, under the condition's lock."""

    vitals: deque[Vitals] = field(default_factory=partial(deque, maxlen=MAX_KEPT_STEPS))
    comparisons: dict[int, Comparison] = field(default_factory=dict)
    to_ask: deque[tuple[int, tuple[str, ...], tuple[int, ...]]] = field(default_factory=deque)
    details: deque[DetailsComparison] = field(default_factory=deque)
    to_measure_from: int = sys.maxsize
    measure_from: int = sys.maxsize
    done: int = -1
    compared: int = -1
    hurried: int = 0
    comparer_closed: bool = False
    last: int | None = None
    closing: bool = False
    connected: bool = False
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
        self._state: State | None = None
        self._began = False
        self._held: deque[tuple[float, Vitals]] = deque(maxlen=MAX_KEPT_STEPS)
        self._pending: deque[tuple[int, float]] = deque()
        self._kept: deque[Vitals] = deque(maxlen=_KEPT_VITALS)
        self._known_missing: set[int] = set()
        self._compared: deque[int] = deque(maxlen=4)
        self._answered = 0
        self._asked: Question | None = None
        self._answers_due: float | None = None
        self._looking = False
        self._has_left = False
        self._attempt: str | None = None
        # Many ranks that look often would keep the store busy.
        self._least_pause_s = max(0.002, world_size * 5e-5)

    def run(self, store: Store) -> None:
        """Serve until closed. The thread's target: what goes wrong is noted, and ends it."""
        try:
            own = PrefixStore("ddpcall/exchange", _open_own(store, self._wait_s))
            with self._changed:
                self._inbox.connected = True
                self._changed.notify_all()
            ledger = Ledger(own, self._rank, self._world_size)
            ledger.announce()
            self._serve(ledger)
        except Exception as error:  # the store is gone or late; whatever it was, the training goes on without
            self._inbox.failure = f"{type(error).__name__}: {error}"
        finally:
            with self._changed:
                self._inbox.finished = True
                self._changed.notify_all()

    def _serve(self, ledger: Ledger) -> None:
        if self._compares:
            self._write(ledger, State(secrets.token_hex(8)))
        pause_s = self._least_pause_s
        while True:
            with self._changed:
                # Asleep without a limit, it must be woken when somebody begins to wait.
                self._looking = self._choose_pause(pause_s) is not None
                woken = self._changed.wait_for(self._has_work, self._choose_pause(pause_s))
                self._held.extend((time.monotonic(), vitals) for vitals in self._inbox.vitals)
                self._inbox.vitals.clear()
                closing = self._inbox.closing
            pause_s = self._least_pause_s if woken else min(2 * pause_s, max(_POLL_S, self._least_pause_s))
            self._follow(ledger)
            self._publish_held(ledger)
            self._answer(ledger)
            self._tell_of_leaving(ledger)
            if self._compares:
                self._compare_pending(ledger)
                self._ask(ledger)
                self._collect_answers(ledger)
            if closing:
                return self._leave(ledger)

    def _has_work(self) -> bool:
        inbox = self._inbox
        is_told = self._state is not None
        news = bool(inbox.vitals or inbox.closing or (inbox.to_ask and self._asked is None and is_told))
        is_leaving = inbox.last is not None and not self._has_left and is_told
        return news or is_leaving or bool(inbox.hurried and not self._looking)

    def _choose_pause(self, pause_s: float) -> float | None:
        """Return the seconds until the store is to be looked at without being told to, or None."""
        expecting = self._inbox.hurried or self._pending or self._held or self._answers_due is not None
        return pause_s if expecting else None

    def _write(self, ledger: Ledger, state: State) -> None:
        ledger.write_state(state)
        self._tell(state)

    def _tell(self, state: State | None, *, closed: bool = False) -> None:
        self._state = state
        with self._changed:
            self._inbox.done = -1 if state is None else state.done
            self._inbox.measure_from = sys.maxsize if state is None else state.measure_from
            self._inbox.comparer_closed = closed
            self._changed.notify_all()

    def _follow(self, ledger: Ledger) -> None:
        """Read the state; forget what was left for an earlier attempt, delete what was compared."""
        if self._compares:
            state = self._state
        else:
            state = ledger.read_state()
            if self._state and (state is None or state.attempt != self._state.attempt):
                ledger.delete_created(sys.maxsize)
                self._answered = 0
            closed = state is not None and state.closed
            # Closed before this rank began: an earlier session's, the coming one's is not there yet.
            self._tell(None if closed else state, closed=closed and self._began)
            self._began = self._began or self._state is not None
        if state is not None:
            ledger.delete_created(state.done)

    def _publish_held(self, ledger: Ledger) -> None:
        """Publish in order; without a state there is nobody to publish for, yet."""
        while self._held and self._state is not None:
            _, vitals = self._held.popleft()
            if vitals.step > self._state.done:
                ledger.post(self._state.attempt, vitals)
                self._kept.append(vitals)
                if self._compares:
                    self._pending.append((vitals.step, time.monotonic()))
        while self._held and time.monotonic() - self._held[0][0] > self._wait_s:
            self._held.popleft()

    def _tell_of_leaving(self, ledger: Ledger) -> None:
        last = self._inbox.last
        if last is not None and not self._has_left and self._state is not None:
            self._has_left = True
            self._attempt = self._state.attempt
            ledger.leave(self._attempt, last)

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
                self._inbox.compared = found[-1].step
                for step in sorted(self._inbox.comparisons)[:-MAX_KEPT_STEPS]:
                    del self._inbox.comparisons[step]
            self._write(ledger, replace(self._state, done=found[-1].step))

    def _is_ready(self, ledger: Ledger, attempt: str, step: int, since: float) -> bool:
        """Say whether nobody is to be waited for: all are there, it is late, the rest left, was missing or silent.

        Ranks announce themselves when they wrap a model, which they all do together: one that has not is not
        watched, and never comes.
        """
        waited_s = time.monotonic() - since
        if waited_s >= self._wait_s or ledger.is_complete(attempt, step):
            return True
        missing = set(ledger.find_missing(attempt, step))
        gone = self._known_missing | ledger.find_left(attempt, step)
        if waited_s >= _ANNOUNCE_S and not gone >= missing:
            gone |= ledger.find_silent(missing - gone)
        return gone >= missing

    def _ask(self, ledger: Ledger) -> None:
        """Put the next question, once the last one is answered; tell from which step on tensors are measured."""
        assert self._state is not None
        with self._changed:
            measure_from = self._inbox.to_measure_from
            to_ask = self._inbox.to_ask.popleft() if self._inbox.to_ask and self._asked is None else None
        if to_ask is not None:
            number = 1 if self._state.question is None else self._state.question.number + 1
            self._asked = Question(number, *to_ask)
            self._answers_due = None
        if to_ask is not None or measure_from != self._state.measure_from:
            question = self._asked or self._state.question
            self._write(ledger, replace(self._state, question=question, measure_from=measure_from))
            self._answer(ledger)

    def _answer(self, ledger: Ledger) -> None:
        """Answer a question about one of the last steps, whose vitals are kept."""
        question = None if self._state is None else self._state.question
        if question is None or question.number <= self._answered or self._rank not in question.ranks:
            return
        assert self._state is not None
        self._answered = question.number
        vitals = next((vitals for vitals in self._kept if vitals.step == question.step), None)
        ledger.answer(self._state.attempt, question, vitals and Answer.of(vitals, question.parts))

    def _collect_answers(self, ledger: Ledger) -> None:
        """Take the answers once all are there, or late.

        Ranks read the question when they publish their next vitals, or leave: the time runs from then.
        """
        assert self._state is not None
        question, attempt = self._asked, self._state.attempt
        if question is None:
            return
        if self._answers_due is None and (self._inbox.hurried or self._kept[-1].step > question.step):
            self._answers_due = time.monotonic() + self._wait_s
        answers = ledger.take_answers(attempt, question)
        awaited = set(question.ranks) - answers.keys()
        is_late = self._answers_due is not None and time.monotonic() >= self._answers_due
        if awaited and not is_late and ledger.find_silent(awaited) != awaited:
            return
        ledger.delete_answers(attempt, question)
        self._asked = self._answers_due = None
        with self._changed:
            self._inbox.details.append(compare_details(question, answers))
            self._changed.notify_all()

    def _leave(self, ledger: Ledger) -> None:
        ledger.take_back()
        if self._compares and self._state is not None:
            ledger.write_state(replace(self._state, done=sys.maxsize, question=None, closed=True))
            ledger.delete_created(sys.maxsize)
            for step in self._compared:
                ledger.delete_step(self._state.attempt, step)
            ledger.delete_left(self._state.attempt, comparing=True)
        elif self._has_left and self._attempt is not None and self._inbox.comparer_closed:
            ledger.delete_left(self._attempt, comparing=False)


def _open_own(store: Store, wait_s: float) -> Store:
    """Return a connection of our own to the same store, none of whose requests takes longer than `wait_s`."""
    own: Any = cast(Any, store).clone()
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
        self._last_step = -1
        worker = _Worker(self._inbox, self._changed, rank, world_size, wait_s, compares=self._compares)
        self._process = os.getpid()
        self._thread = threading.Thread(target=worker.run, args=(store,), name="ddpcall exchange", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def failure(self) -> str | None:
        """Why nothing is compared any more, or None."""
        return self._inbox.failure

    @property
    def has_compared(self) -> bool:
        """Whether the comparing rank has compared a step, as far as this rank knows."""
        return self._inbox.done >= 0

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

    def compare(self, step: int, *, wait: bool = False, wait_s: float | None = None) -> Comparison | None:
        """Return the comparison of a step, once; None while ranks are missing that may still come.

        Args:
            step: A step that was published; ask one interval later, so that nobody waits.
            wait: Wait until the comparison is there: at the end of a run.
            wait_s: For at most so many seconds; twice the exchange's own by default.

        Returns:
            None for ever on ranks other than the comparing one, after a failure, and for steps never published.
        """
        with self._changed:
            if wait and self._compares:
                # It may have been taken already, by `comparisons`.
                self._await(lambda: self._inbox.compared >= step, 2 * self._wait_s if wait_s is None else wait_s)
            return self._inbox.comparisons.pop(step, None)

    def comparisons(self) -> list[Comparison]:
        """Return all comparisons not yet taken, oldest first, each once."""
        with self._changed:
            return [self._inbox.comparisons.pop(step) for step in sorted(self._inbox.comparisons)]

    def measure_from(self, step: int) -> None:
        """Let all ranks look at their parameters closely, from a step on; for the comparing rank."""
        with self._changed:
            self._inbox.to_measure_from = step

    def measures(self, step: int) -> bool:
        """Say whether parameters are to be looked at closely in this step."""
        return step >= self._inbox.measure_from

    def ask(self, comparison: Comparison, *, at: int | None = None) -> None:
        """Ask one rank of each group what the parts that differ are made of; for the comparing rank.

        Args:
            comparison: What differs, and whom to ask.
            at: The step to ask about, where it is not that of the comparison.

        The threads answer, for the same step, from what they kept of the last few. Questions are put one after the
        other, and their answers come in this order.
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
            if wait and self._compares:
                self._await(lambda: bool(self._inbox.details), 2 * self._wait_s)
            return self._inbox.details.popleft() if self._inbox.details else None

    def leave(self, last_words: Vitals | None = None) -> None:
        """Say that no further step is published, so that the comparing rank does not wait for it.

        Args:
            last_words: What this rank leaves with, in place of a step.
        """
        with self._changed:
            if not self._compares:
                self._inbox.last = self._last_step
            if last_words is not None:
                self._inbox.vitals.append(last_words)
            self._changed.notify_all()

    def serve(self) -> None:
        """After `leave`: answer until the comparing rank closes, at most twice `wait_s`, unless it goes on."""
        with self._changed:
            inbox = self._inbox
            self._await(
                lambda: inbox.comparer_closed or self._last_step < inbox.done < AT_THE_END, 2 * self._wait_s
            )

    def close(self) -> None:
        """Publish what is left, delete the keys and end the thread; returns within `wait_s`, whatever happens."""
        atexit.unregister(self.close)
        if os.getpid() != self._process:  # forked: the thread is not here, and may have held the lock
            return
        with self._changed:
            self._inbox.closing = True
            self._changed.notify_all()
        self._thread.join(self._wait_s)

    def _await(self, is_there: Callable[[], bool], seconds: float) -> None:
        """Wait under the lock, while the thread looks more often.

        The time runs from when the thread is connected: where names are looked up slowly that alone takes seconds.
        """
        self._changed.wait_for(lambda: self._inbox.connected or self._inbox.finished, _CONNECT_S)
        self._inbox.hurried += 1
        self._changed.notify_all()
        self._changed.wait_for(lambda: is_there() or self._inbox.finished, seconds)
        self._inbox.hurried -= 1
