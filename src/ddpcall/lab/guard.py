"""A thread that ends a run which cannot end by itself: a signal, a hang, another rank that gave up."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator

import torch.distributed as dist

from ddpcall.lab.errors import EXIT_FAILED
from ddpcall.lab.stop import SAVE_SECONDS, Stop
from ddpcall.lab.world import POLL_SECONDS, World
from ddpcall.launch_environment import read_address

# How long ranks wait for each other's last words once something has gone wrong.
FAREWELL_SECONDS = 5.0
GUARD_SECONDS = 0.25
CUT_OFF_SECONDS = 30.0  # after a trial's time; the guard needs less than half of it where the store answers
_STOPPING = (signal.SIGTERM, signal.SIGINT)


class Guard:
    """A thread beside the run: it ends the process on a signal, on a hang, or when another rank gave up.

    The main thread cannot: it may be blocked inside a collective, where no Python signal handler runs.
    """

    def __init__(
        self,
        world: World,
        on_hang: Callable[[str, dict[int, str], list[int]], None],
        on_signal: Callable[[str, list[int]], None],
        on_store_lost: Callable[[], None],
    ) -> None:
        """Remember whom to tell.

        Args:
            world: The ranks.
            on_hang: Called on the one rank that reports, with the trial's name, the stacks by rank and the
                ranks that gave none.
            on_signal: Called with the signal's name and the ranks that gave no sign of life.
            on_store_lost: Called on every rank when the store fails.
        """
        self.stop = Stop(world)
        self._world = world
        self._on_hang = on_hang
        self._on_signal = on_signal
        self._on_store_lost = on_store_lost
        self._name = ""
        self._deadline: float | None = None

    @contextlib.contextmanager
    def watch(self) -> Generator[None]:
        """Guard the body. SIGTERM and SIGINT go to the guard alone meanwhile; main thread only."""
        awake, wake = socket.socketpair()
        with awake, wake:
            wake.setblocking(False)
            before = {number: signal.signal(number, lambda *_: None) for number in _STOPPING}
            fd_before = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
            done = threading.Event()
            thread = threading.Thread(target=self._guard, args=(awake, done), daemon=True)
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()
                signal.set_wakeup_fd(fd_before)
                for number, handler in before.items():
                    signal.signal(number, handler)

    @contextlib.contextmanager
    def limit(self, name: str, seconds: float) -> Generator[None]:
        """Allow the body this many seconds."""
        self._name, self._deadline = name, time.monotonic() + seconds
        last = threading.Timer(seconds + CUT_OFF_SECONDS, self._leave_cut_off)
        last.daemon = True
        last.start()
        try:
            yield
        finally:
            self._deadline = None
            last.cancel()

    def _leave_cut_off(self) -> None:
        """End a rank whose guard waits for the store: a store behind a cut cable never answers nor fails."""
        print(
            f"ddpcall: rank {self._world.rank} leaves {self._name}: its time is over, and the store at "
            f"{read_address()[0] or 'rank 0'} does not answer. Is this host cut off from it?",
            file=sys.stderr,
        )
        _leave()

    def _guard(self, awake: socket.socket, done: threading.Event) -> None:
        try:
            self._stand_guard(awake, done)
        except dist.DistError:
            self._on_store_lost()
            _leave()

    def _stand_guard(self, awake: socket.socket, done: threading.Event) -> None:
        while not done.is_set():
            ready, _, _ = select.select([awake], [], [], GUARD_SECONDS)
            arrived = set(awake.recv(64)) & set(_STOPPING) if ready else set()
            if arrived:
                self._stop(signal.Signals(min(arrived)).name)
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._expire(self._name)
            self.stop.listen()
            self._answer_others()

    def _answer_others(self) -> None:
        self._world.answer_presence()
        if self._world.is_over():
            _leave()

    def _let_trial_save(self) -> None:
        self.stop.ask()
        deadline = time.monotonic() + SAVE_SECONDS
        while self.stop.can_save and not self.stop.is_over.wait(POLL_SECONDS) and time.monotonic() < deadline:
            self._answer_others()

    def _stop(self, signal_name: str) -> None:
        self._answer_others()  # the launcher signals the ranks that are left, too
        self._world.publish("stacks", dump_stacks())
        try:
            missing = self._world.ask_presence(FAREWELL_SECONDS)
            if not missing:
                self._let_trial_save()
            self._on_signal(signal_name, missing)
            self._world.end()
        finally:
            _leave()

    def _expire(self, name: str) -> None:
        world = self._world
        world.publish("stacks", dump_stacks())
        missing = world.wait_for("stacks", FAREWELL_SECONDS)
        try:
            if world.claim("hang_reporter"):
                ranks = [rank for rank in range(world.world_size) if rank not in missing]
                stacks = {rank: self._stacks_of(rank) for rank in ranks}
                self._on_hang(name, stacks, missing)
                world.publish("hang_reported", True)
            else:
                _wait_for_any(world, "hang_reported", FAREWELL_SECONDS)
        finally:
            _leave()

    def _stacks_of(self, rank: int) -> str:
        return dump_stacks() if self._world.store is None else self._world.read("stacks", rank)


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_FAILED)


def _wait_for_any(world: World, key: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and not any(world.has(key, rank) for rank in range(world.world_size)):
        time.sleep(POLL_SECONDS)


def dump_stacks() -> str:
    """Return the Python stack of every thread of this process, most recent call first."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
