"""Records of measured steps: every rank leaves its own on the store, and the comparing rank reads all of them.

A thread does it, over a connection of its own, so that no request holds the training up. No collective.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store

MAX_RANKS = 64
"""The comparing rank reads every rank's record: with more ranks it would be busy with that."""
_POLL_S = 0.02
_MAX_WAITING = 32


class RecordExchange:
    """Brings the records of one step together on rank 0, late and without holding any rank up.

    Args:
        store: One that all ranks share; it is cloned.
        rank: This rank.
        world_size: How many ranks there are, at most `MAX_RANKS`.
        wait_s: Seconds that a step waits for ranks that are late.

    Attributes:
        failure: Why nothing more is exchanged; empty where nothing went wrong.
    """

    def __init__(self, store: Store, rank: int, world_size: int, wait_s: float) -> None:
        own: Any = store
        own = own.clone()
        own.set_timeout(timedelta(seconds=wait_s))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"ddpcall/records/{attempt}", own)
        self._rank, self._world_size, self._wait_s = rank, world_size, wait_s
        self.failure = ""
        self._changed = threading.Condition()
        self._to_post: deque[tuple[int, Callable[[], bytes]]] = deque()
        self._pending: deque[tuple[int, float]] = deque(maxlen=_MAX_WAITING)
        self._complete: deque[tuple[int, dict[int, bytes]]] = deque()
        self._own: dict[int, bytes] = {}
        self._is_ending = self._has_ended = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="ddpcall records", daemon=True)
        self._thread.start()

    def post(self, step: int, record: Callable[[], bytes]) -> None:
        """Hand this rank's record of a step to the thread, which has it made into bytes."""
        with self._changed:
            self._to_post.append((step, record))
            self._changed.notify_all()

    def take(self) -> list[tuple[int, dict[int, bytes]]]:
        """Return the steps whose records are together, oldest first, each once: rank 0 alone gets any."""
        with self._changed:
            found = list(self._complete)
            self._complete.clear()
        return found

    def finish(self, waits: bool = True) -> None:
        """Post what is left; on rank 0, wait for the other ranks' last records, bounded by `wait_s`.

        Args:
            waits: False to take only what is there already.
        """
        if os.getpid() != self._process:  # forked: the thread is not here
            return
        with self._changed:
            self._is_ending = True
            self._wait_s = self._wait_s if waits else 0.0
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._has_ended, 2 * self._wait_s + 2.0)

    # ---- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._serve():
                pass
        except Exception as error:  # the store is gone: the training goes on without
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def _serve(self) -> bool:
        """Do what there is to do; say whether to go on."""
        with self._changed:
            pause_s = _POLL_S if self._pending else None
            self._changed.wait_for(lambda: bool(self._to_post) or self._is_ending, pause_s)
            to_post = list(self._to_post)
            self._to_post.clear()
            ending = self._is_ending
        for step, record in to_post:
            if self._rank == 0:
                self._pending.append((step, time.monotonic()))
                self._own[step] = record()
            else:
                self._store.set(f"{step}/{self._rank}", record())  # pyright: ignore[reportArgumentType]
        if ending and self._rank:
            self._store.set(f"left/{self._rank}", "")
            return False
        while self._pending and self._collect(*self._pending[0]):
            self._pending.popleft()
        return not (ending and not self._pending)

    def _collect(self, step: int, since: float) -> bool:
        """Read the records of a step if all are there that will come."""
        others = range(1, self._world_size)
        waited = [rank for rank in others if not self._store.check([f"{step}/{rank}"])]
        is_late = time.monotonic() - since > self._wait_s
        if waited and not is_late and not all(self._store.check([f"left/{rank}"]) for rank in waited):
            return False
        # Whoever left may have posted this step right before.
        there = [rank for rank in others if self._store.check([f"{step}/{rank}"])]
        records = {0: self._own.pop(step)}
        for rank in there:
            records[rank] = self._store.get(f"{step}/{rank}")
            self._store.delete_key(f"{step}/{rank}")
        with self._changed:
            self._complete.append((step, records))
        return True
