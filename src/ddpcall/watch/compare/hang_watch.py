"""Says which rank waits where while a run hangs: from a thread, over the store, never through the group."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from ddpcall.launch_environment import read_attempt
from ddpcall.taps import CallSite, find_call_frames_among, site_of
from ddpcall.watch.compare.exchange import find_store
from ddpcall.watch.rules.control import Silence, judge_ends, missing
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.positions import ENDED, FAILED, LEFT, RUNS, Position, PositionSensor, communicates

STORE_S = 5.0
LOOKS = 8
"""Looks at this rank within the time that it may be silent."""
_LONGEST_PAUSE_S = 10.0


class HangWatch(Rule):
    """Writes where this rank is to the store, and reads all ranks' positions once this one waits too long.

    Args:
        run: What this rank knows; its book gets findings, from the thread.
        bound_s: Seconds without progress after which a collective counts as one that waits; 0 for never: then this
            rank says only how far it came, when it leaves.
        say: Prints a line at once.

    Blind to: a hang in which the interpreter's lock is held; ranks of groups other than the default one that do
    not wait; hangs before there is a process group.
    """

    def __init__(self, run: Run, bound_s: float, say: Callable[[str], object]) -> None:
        super().__init__(run)
        self._say = say
        self._bound_s = bound_s
        self._pause_s = min(bound_s / LOOKS, _LONGEST_PAUSE_S) if bound_s else None
        self._sensor = PositionSensor(run)
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._process = 0
        self._rank = self._num_ranks = 0
        self._store: Store | None = None
        self._state = RUNS
        self._last_look: list[tuple[int, Position]] = []
        self._told: tuple[int, ...] = ()
        self._found: tuple[int, ...] = ()

    def before_backward(self) -> None:
        """Count it."""
        self._sensor.begin_backward()

    def begin_forward(self) -> None:
        """Count a wrapper's forward."""
        self._sensor.begin_forward()

    def group_made(self) -> None:
        """Look from now on: there is a default process group; once in a process."""
        if self._process == os.getpid() or dist.get_world_size() == 1:
            return
        self._process, self._rank, self._num_ranks = os.getpid(), dist.get_rank(), dist.get_world_size()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="ddpcall hang watch", daemon=True)
        self._thread.start()

    def leave(self, in_order: bool, is_over: bool) -> None:
        """Say that this rank is no longer watched; the others may wait for it.

        Args:
            in_order: Whether nothing failed.
            is_over: Whether the script is over, and not only a block of it that was watched.
        """
        if self._thread is None or self._process != os.getpid():
            return
        self._state = FAILED if not in_order else ENDED if is_over else LEFT
        self._ending.set()
        self._thread.join(STORE_S)

    def explain_crash(self, error: BaseException) -> None:
        """Say, where a collective failed because another rank's script was over, that it took fewer steps."""
        lines: dict[Any, int] = dict(traceback.walk_tb(error.__traceback__))  # by frame, outermost first
        if self._store is None or not isinstance(error, RuntimeError) or not communicates([*lines][-1]):
            return
        if self._found == self._sensor.read(FAILED).counts:  # told while it hung
            return
        frame, caller = find_call_frames_among([*lines][::-1])
        site = site_of(frame, caller)
        own, site = self._sensor.read(FAILED), replace(site, line=lines.get(frame, site.line))
        deadline = time.monotonic() + STORE_S
        while time.monotonic() < deadline and not self._explain(self._store, own, site):
            time.sleep(0.05)  # the other rank closes its connections before it says that it is over

    def _explain(self, store: Store, own: Position, site: CallSite) -> bool:
        try:
            finding = judge_ends(own, self._read_all(store, own), site)
        except Exception:  # the store went with the other rank
            return True
        if finding is not None:
            self._run.report(finding)
        return finding is not None

    # ---- the thread -------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            store = self._open()
            while store is not None:
                is_over = self._ending.wait(self._pause_s)
                own = self._sensor.read(self._state)
                store.set(str(self._rank), own.to_json())
                if is_over:
                    return
                self._look(store, own)
        except Exception as error:  # the store is gone: nobody can be asked any more
            self._run.faults += [f"{type(error).__name__}: {error}".splitlines()[0]] * (self._state == RUNS)

    def _open(self) -> Store | None:
        shared: Any = find_store()
        if shared is None:
            return None
        own = shared.clone()
        own.set_timeout(timedelta(seconds=STORE_S))
        attempt = read_attempt()
        self._store = PrefixStore(f"ddpcall/positions/{attempt}", own)
        return self._store

    def _look(self, store: Store, own: Position) -> None:
        """Where this rank waits too long: the first that does reads what the others wrote, and says it."""
        if not own.operation or own.silent_s < self._bound_s:
            self._last_look = []
            return
        if store.compare_set("reader", "", str(self._rank)).decode() != str(self._rank):
            reader = self._read(store, int(store.get("reader")))
            if reader is not None and reader.operation and reader.silent_s >= self._bound_s:
                return
            store.set("reader", str(self._rank))  # it waits no more: somebody else has to
        look = Silence(self._rank, self._read_all(store, own), self._bound_s)
        if self._told != own.counts:
            self._told = own.counts
            unheard = missing(look.positions, self._num_ranks)
            self._say(f"ddpcall watch: no progress for {own.silent_s:.0f} s\n{look.describe()}{unheard}")
        seen = look.standing()
        if self._found != own.counts and seen == self._last_look:  # else what was read may be of several moments
            self._judge(look)
        self._last_look = seen

    def _judge(self, look: Silence) -> None:
        finding = look.judge(self._num_ranks)
        if finding is None:
            return
        self._found = look.own.counts
        self._say(f"  {finding.message}")  # the list at the end may never come
        try:
            self._run.report(finding)
        except RuntimeError as error:  # raised for nobody: the thread that trains stands in the collective
            self._say(str(error))

    def _read_all(self, store: Store, own: Position) -> dict[int, Position]:
        others = {rank: self._read(store, rank) for rank in range(self._num_ranks) if rank != self._rank}
        heard = {rank: position for rank, position in others.items() if position is not None}
        return dict(sorted({self._rank: own, **heard}.items()))

    def _read(self, store: Store, rank: int) -> Position | None:
        return Position.from_json(store.get(str(rank))) if store.check([str(rank)]) else None
