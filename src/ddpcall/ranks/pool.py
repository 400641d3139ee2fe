"""A pool of warm ranks: started once, given one task after another, replaced when one of them is lost."""

import atexit
import contextlib
import functools
import os
import pickle
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ddpcall.ranks.interpreters import ForkServer, FreshInterpreters, Interpreters, worker_defaults
from ddpcall.ranks.outcomes import (
    RankOutcome,
    RanksFailed,
    describe_exit,
    locate_main_thread,
    shorten,
    trim_stacks,
    waits_for_peers,
)
from ddpcall.ranks.worker import STACKS_SIGNAL, Reply, Task, WorkerSlot

GRACE_S = 5.0  # how long the other ranks may go on once one has failed
_STACKS_WAIT_S = 2.0
_ECHO_INTERVAL_S = 0.05
_GROUP_TIMEOUT_MARGIN_S = 60.0  # the pool's timeout comes first: it shows stacks, a collective's shows none


@dataclass
class _Worker:
    """A rank's process, as its parent sees it."""

    slot: WorkerSlot
    pid: int
    connection: Connection
    sentinel: int | None  # readable when the process has ended; None where the system has no pidfd
    status: int | None = None  # exit status, once reaped
    echoed_bytes: dict[Path, int] = field(default_factory=dict)

    def has_ended(self) -> bool:
        return self.sentinel is not None and bool(select.select([self.sentinel], [], [], 0)[0])

    def kill(self) -> None:
        for kill, target in ((os.killpg, self.pid), (os.kill, self.pid)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(target, signal.SIGKILL)

    def close(self) -> None:
        self.connection.close()
        if self.sentinel is not None:
            os.close(self.sentinel)
            self.sentinel = None


class RankPool:
    """Worker processes that keep torch imported; each task gets a process group of its own.

    Grows to the largest world size asked for. After a task on which a rank died, hung or leaked, all workers are
    replaced. Use it as a context manager, or call `close`.

    Args:
        fresh: start a new interpreter per worker instead of forking a warm one, and keep it for one task only.
    """

    def __init__(self, *, fresh: bool = False) -> None:
        self.num_starts = 0
        self._fresh = fresh
        self._interpreters: Interpreters | None = None
        self._workers: list[_Worker] = []
        self._directory: Path | None = None
        self._store: Any = None
        self._num_tasks = 0
        self._lock = threading.RLock()

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm_up(self) -> None:
        """Begin to start the pool without waiting for it."""
        if self._interpreters is None:
            self._directory = Path(tempfile.mkdtemp(prefix="ddpcall-ranks-"))
            self._interpreters = (FreshInterpreters if self._fresh else ForkServer)(self._directory)

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        backend: str = "gloo",
        timeout_s: float = 60.0,
        echo: Callable[[int, str], None] | None = None,
        **kwargs: Any,
    ) -> list[RankOutcome]:
        """Run a function on ranks 0 to world_size - 1 and wait for all of them.

        Args:
            function: picklable by name, so defined at the top level of a module.
            world_size: number of ranks.
            *args: positional arguments of the function.
            backend: backend of the default process group.
            timeout_s: seconds the whole task may take.
            echo: called with (rank, line) for every line a rank prints, while it runs.
            **kwargs: keyword arguments of the function.

        Returns:
            One outcome per rank, in rank order, failed or not.

        Raises:
            TypeError: the function or an argument cannot be pickled.
            ValueError: the world size is not positive, or there are not enough GPUs for "nccl".
        """
        _check_request(world_size, backend)
        payload = _pickle_call(function, args, kwargs)
        with self._lock:
            try:
                return self._run(payload, world_size, backend, timeout_s, echo)
            except BaseException:
                self._drop_workers()  # interrupted half-way: what the workers are doing is unknown
                raise

    def _run(
        self,
        payload: bytes,
        world_size: int,
        backend: str,
        timeout_s: float,
        echo: Callable[[int, str], None] | None,
    ) -> list[RankOutcome]:
        workers = self._place_workers(world_size)
        task = self._make_task(payload, world_size, backend, timeout_s)
        for worker in workers:
            worker.echoed_bytes.clear()
            with contextlib.suppress(OSError):  # a dead worker is found by the loop below
                worker.connection.send(task)
        outcomes = self._collect(workers, timeout_s, echo)
        if self._fresh or any(o.ending in ("died", "hung", "leaked") for o in outcomes):
            self._drop_workers()
        return outcomes

    def _make_task(self, payload: bytes, world_size: int, backend: str, timeout_s: float) -> Task:
        if self._store is None:
            from torch.distributed import TCPStore

            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # A task that calls `init_process_group()` itself must not find the addresses of an earlier one that did.
        for key in self._store.list_keys():
            self._store.delete_key(key)
        self._num_tasks += 1
        return Task(
            number=self._num_tasks,
            world_size=world_size,
            backend=backend,
            payload=payload,
            store_port=self._store.port,
            group_timeout_s=timeout_s + _GROUP_TIMEOUT_MARGIN_S,
            main=_locate_main() if b"__main__" in payload else None,
            environ=os.environ | worker_defaults(),
        )

    def _place_workers(self, world_size: int) -> list[_Worker]:
        if any(worker.has_ended() for worker in self._workers):
            self._drop_workers()  # died between two tasks
        if not self._workers:
            self.num_starts += 1
        self.warm_up()
        while len(self._workers) < world_size:
            self._workers.append(self._start_worker(len(self._workers)))
        return self._workers[:world_size]

    def _start_worker(self, rank: int) -> _Worker:
        assert self._interpreters is not None
        assert self._directory is not None
        slot = WorkerSlot(rank, self._directory)
        pid, connection = self._interpreters.start()
        with contextlib.suppress(OSError):
            connection.send(slot)
        sentinel = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
        return _Worker(slot, pid, connection, sentinel)

    def _collect(
        self, workers: Sequence[_Worker], timeout_s: float, echo: Callable[[int, str], None] | None
    ) -> list[RankOutcome]:
        """Wait for every rank, for a while longer once one has failed, then take the stacks of the rest."""
        pending = {worker.slot.rank: worker for worker in workers}
        outcomes: dict[int, RankOutcome] = {}
        deadline_s = time.monotonic() + timeout_s
        while pending and time.monotonic() < deadline_s:
            for worker in _wait_for_any(list(pending.values()), deadline_s, echo is not None):
                if (outcome := self._receive(worker)) is not None:
                    outcomes[outcome.rank] = outcome
                    del pending[outcome.rank]
                    if outcome.failed:
                        deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
            _echo_output(workers, echo)
        for worker in pending.values():
            outcomes[worker.slot.rank] = _describe_hang(worker, timeout_s)
        _echo_output(workers, echo)
        return [outcomes[worker.slot.rank] for worker in workers]

    def _receive(self, worker: _Worker) -> RankOutcome | None:
        """Take a worker's reply, or its death; None if there is neither yet."""
        try:
            if worker.connection.poll():
                return _to_outcome(worker.slot, worker.connection.recv())
            if not worker.has_ended():
                return None
        except (EOFError, OSError):
            pass  # the other end is closed: it died in the middle of a reply
        ended_s = time.monotonic()
        worker.kill()
        error = describe_exit(self._reap(worker))
        return RankOutcome(worker.slot.rank, "died", error=error, ended_s=ended_s, **_read_output(worker.slot))

    def _reap(self, worker: _Worker) -> int:
        if worker.status is None:
            assert self._interpreters is not None
            worker.status = self._interpreters.reap(worker.pid)
        return worker.status

    def _drop_workers(self) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            self._reap(worker)
            worker.close()
        self._workers.clear()

    def close(self) -> None:
        """Kill every worker and remove the pool's files. The pool starts again if it is used again."""
        with self._lock:
            self._drop_workers()
            if self._interpreters is not None:
                self._interpreters.close()
            if self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)
            self._interpreters = self._directory = self._store = None


def _check_request(world_size: int, backend: str) -> None:
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; there must be at least one rank")
    if missing := explain_missing_gpus(backend, world_size):
        raise ValueError(missing)


def explain_missing_gpus(backend: str, world_size: int) -> str:
    """Say why `world_size` ranks cannot use a backend here; empty if they can."""
    if backend == "gloo":
        return ""  # without importing torch
    from ddpcall.accelerator import explain_missing_devices

    return explain_missing_devices(backend, world_size)


def _pickle_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    try:
        return pickle.dumps((function, args, kwargs))
    except Exception as error:
        name = getattr(function, "__qualname__", repr(function))
        raise TypeError(
            f"{name} or one of its arguments cannot be sent to other processes: {error}. "
            "Define the function at the top level of a module and pass what it needs as arguments."
        ) from error


def _locate_main() -> tuple[str, str] | None:
    main = sys.modules["__main__"]
    if (spec := getattr(main, "__spec__", None)) is not None:
        return ("name", spec.name)
    path = getattr(main, "__file__", None)
    return None if path is None else ("path", os.path.abspath(path))


def _wait_for_any(workers: Sequence[_Worker], deadline_s: float, echoes: bool) -> list[_Worker]:
    remaining_s = max(0.0, deadline_s - time.monotonic())
    sources: dict[Any, _Worker] = {}
    for worker in workers:
        sources[worker.connection] = worker
        if worker.sentinel is not None:
            sources[worker.sentinel] = worker
    ready = wait(list(sources), min(remaining_s, _ECHO_INTERVAL_S) if echoes else remaining_s)
    return list({sources[source].slot.rank: sources[source] for source in ready}.values())


def _to_outcome(slot: WorkerSlot, reply: Reply) -> RankOutcome:
    output = _read_output(slot)
    if reply.error:
        error = reply.error + "".join(f"; {leak}" for leak in reply.leaks)
        # Leaks come with an exception too: the pool must be replaced then as well.
        ending = "leaked" if reply.leaks else "raised"
        return RankOutcome(slot.rank, ending, error=error, details=reply.details, ended_s=reply.ended_s, **output)
    try:
        value = pickle.loads(reply.value or b"")
    except Exception as error:
        text = f"the result cannot be loaded here: {type(error).__name__}: {error}"
        return RankOutcome(slot.rank, "raised", error=text, ended_s=reply.ended_s, **output)
    if reply.leaks:
        text = "the task left something running: " + "; ".join(reply.leaks)
        return RankOutcome(slot.rank, "leaked", value, text, ended_s=reply.ended_s, **output)
    return RankOutcome(slot.rank, "returned", value, ended_s=reply.ended_s, **output)


def _read_output(slot: WorkerSlot) -> dict[str, str]:
    return {"stdout": _read_shortened(slot.stdout), "stderr": _read_shortened(slot.stderr)}


def _read_shortened(path: Path, limit_bytes: int = 64_000) -> str:
    """Read a file of any size without holding more than the part that is kept."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes <= limit_bytes:
            return file.read().decode(errors="replace")
        head = file.read(limit_bytes // 2)
        file.seek(size_bytes - limit_bytes // 2)
        left_out = f"\n[... {size_bytes - limit_bytes:,} bytes left out ...]\n"
        return head.decode(errors="replace") + left_out + file.read().decode(errors="replace")
    return ""


def _echo_output(workers: Sequence[_Worker], echo: Callable[[int, str], None] | None) -> None:
    if echo is None:
        return
    for worker in workers:
        for path in (worker.slot.stdout, worker.slot.stderr):
            for line in _new_lines(worker, path):
                echo(worker.slot.rank, line)


def _new_lines(worker: _Worker, path: Path) -> list[str]:
    start = worker.echoed_bytes.get(path, 0)
    with path.open("rb") as file:
        file.seek(start)
        whole, newline, _ = file.read().rpartition(b"\n")
    worker.echoed_bytes[path] = start + len(whole) + len(newline)
    return whole.decode(errors="replace").splitlines() if newline else []


def _describe_hang(worker: _Worker, timeout_s: float) -> RankOutcome:
    """Take a rank's Python stacks and say where it stands."""
    stopped = _is_stopped(worker.pid)
    stacks = shorten(trim_stacks(_dump_stacks(worker)), 16_000)
    place = locate_main_thread(stacks)
    doing = "waiting for other ranks in" if waits_for_peers(stacks) else "still running in"
    if stopped:
        doing = "stopped (SIGSTOP) in"
    error = f"{doing} {place or 'native code'} when the time was up (timeout {timeout_s:g} s)"
    output = _read_output(worker.slot)
    return RankOutcome(worker.slot.rank, "hung", error=error, details=stacks, ended_s=time.monotonic(), **output)


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _dump_stacks(worker: _Worker) -> str:
    """Ask a worker for its stacks; a stopped one is continued, or it could not answer."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker.pid, STACKS_SIGNAL)
        os.kill(worker.pid, signal.SIGCONT)
    deadline_s = time.monotonic() + _STACKS_WAIT_S
    size_bytes = 0
    while time.monotonic() < deadline_s:
        time.sleep(0.05)
        previous, size_bytes = size_bytes, _size_bytes(worker.slot.stacks)
        if size_bytes and size_bytes == previous:
            break
    return _read_shortened(worker.slot.stacks, 1_000_000)


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


@functools.cache
def _shared_pool(pid: int) -> RankPool:
    """The pool behind `run_on_ranks`, one per process: a forked child must not use its parent's."""
    pool = RankPool()
    atexit.register(lambda: pool.close() if os.getpid() == pid else None)
    return pool


def run_on_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    backend: str = "gloo",
    timeout_s: float = 60.0,
    fresh: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Run a function on several local ranks, inside an initialized default process group.

    The first call in a process starts a pool of warm workers (seconds); later calls take milliseconds. Every rank
    sees the caller's environment and directory, the variables torchrun sets, and the same seeds.

    Args:
        function: defined at the top level of a module, so that other processes can import it.
        world_size: number of ranks.
        *args: positional arguments of the function, the same on every rank.
        backend: backend of the process group.
        timeout_s: seconds the whole call may take.
        fresh: run in new interpreters, started for this call and ended after it.
        **kwargs: keyword arguments of the function.

    Returns:
        What the function returned on each rank, in rank order.

    Raises:
        RanksFailed: a rank raised, exited, was killed, hung, returned something unpicklable, or left threads or
            child processes running. The message shows every rank, the cause first.
        TypeError: the function or an argument cannot be pickled.
        ValueError: the world size is not positive, or there are not enough GPUs for "nccl".

    Blind to: what the function changes inside imported modules; pooled ranks keep those for the next call.
    """
    if fresh:
        with RankPool(fresh=True) as pool:
            outcomes = pool.run(function, world_size, *args, backend=backend, timeout_s=timeout_s, **kwargs)
    else:
        pool = _shared_pool(os.getpid())
        outcomes = pool.run(function, world_size, *args, backend=backend, timeout_s=timeout_s, **kwargs)
    if any(outcome.failed for outcome in outcomes):
        raise RanksFailed(getattr(function, "__qualname__", repr(function)), outcomes)
    return [outcome.value for outcome in outcomes]
