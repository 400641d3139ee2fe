"""This process among its ranks: the shared store, device and backend, process groups, starting missing ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import pickle
import socket
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ddpcall import accelerator
from ddpcall.accelerator import CPU_BACKEND, Accelerator
from ddpcall.lab.errors import WrongUse
from ddpcall.launch_environment import (
    has_agent_store,
    is_of_a_launch,
    read_address,
    read_attempt,
    read_torch_place,
)

CONNECT_SECONDS = 60.0
CONNECTED_SECONDS = 20.0
POLL_SECONDS = 0.005


class RankLost(RuntimeError):
    """Some ranks gave no sign of life where they had to.

    Attributes:
        ranks: The missing ranks.
    """

    def __init__(self, ranks: list[int], where: str) -> None:
        self.ranks = ranks
        names = ", ".join(map(str, ranks))
        super().__init__(f"rank {names} disappeared: killed, stopped or exited early (nothing came for {where})")


class NobodyListens(WrongUse):
    """The store that this rank is to join is not there; rank 0 may not be, either."""


class RankFailed(RuntimeError):
    """This rank raised in a trial and the others did not; they may be waiting for it in a collective."""


@dataclass(frozen=True)
class World:
    """The ranks of one run.

    Attributes:
        rank: This process, from 0.
        world_size: Number of ranks.
        local_rank: This process on its machine.
        local_world_size: Ranks on this machine.
        store: Key-value store that every rank reaches; None in a world of one. Only ever polled, so that the
            guard thread never waits for the main one.
        group_store: A second connection to it, for process groups: they block on it while they form.
        hosts_store: Whether the store ends with this process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    store: dist.Store | None = None
    group_store: dist.Store | None = None
    hosts_store: bool = False

    def publish(self, key: str, value: Any) -> None:
        """Leave a picklable value where every rank can read it."""
        if self.store is not None:
            pickled: Any = pickle.dumps(value)  # the stub says str; the store takes bytes
            self.store.set(f"{key}/{self.rank}", pickled)

    def collect(self, key: str, own: Any, timeout_s: float) -> list[Any]:
        """Publish a value and wait for everybody's; the list has one entry a rank.

        Raises:
            RankLost: Some rank published nothing within the timeout.
        """
        if self.store is None:
            return [own]
        self.publish(key, own)
        missing = self.wait_for(key, timeout_s)
        if missing:
            raise RankLost(missing, key)
        return [self.read(key, rank) for rank in range(self.world_size)]

    def wait_for(self, key: str, timeout_s: float) -> list[int]:
        """Wait until every rank has published `key`; return the ranks that have not by then.

        Polls: a blocking wait would hold the connection against the guard thread.
        """
        deadline = time.monotonic() + timeout_s
        missing = list(range(self.world_size)) if self.store is not None else []
        while missing:
            missing = [rank for rank in missing if not self.has(key, rank)]
            if missing and time.monotonic() > deadline:
                return missing
            if missing:
                time.sleep(POLL_SECONDS)
        return []

    def has(self, key: str, rank: int) -> bool:
        """Say whether a rank has published `key`."""
        return self.store is not None and self.store.check([f"{key}/{rank}"])

    def read(self, key: str, rank: int) -> Any:
        """Return what a rank published; it must be there."""
        assert self.store is not None
        return pickle.loads(self.store.get(f"{key}/{rank}"))

    def ask_presence(self, timeout_s: float) -> list[int]:
        """Ask every rank for a sign of life, also those that are blocked; return the ranks that gave none."""
        if self.store is not None:
            self.store.set("presence_asked", "yes")
        self.publish("alive", True)
        return self.wait_for("alive", timeout_s)

    def leave(self) -> None:
        """Say that this rank asks the store nothing more; whoever hosts it waits for the others to say so."""
        self.publish("gone", True)
        if self.hosts_store:
            self.wait_for("gone", CONNECTED_SECONDS)

    def answer_presence(self) -> None:
        """Give the sign of life, if somebody asked for it."""
        if self.store is not None and self.store.check(["presence_asked"]):
            self.publish("alive", True)

    def end(self) -> None:
        """Tell ranks that are stuck in a collective that the run is over."""
        if self.store is not None:
            self.store.set("over", "yes")

    def is_over(self) -> bool:
        """Say whether some rank ended the run."""
        return self.store is not None and self.store.check(["over"])

    def claim(self, key: str) -> bool:
        """Return True on exactly one of the ranks that ask; on rank 0 where the store is gone."""
        if self.store is None:
            return True
        try:
            return self.store.compare_set(key, "", str(self.rank)) == str(self.rank).encode()
        except dist.DistError:
            return self.rank == 0


def open_world() -> World:
    """Join the ranks that the environment speaks of (`RANK`, `WORLD_SIZE`, `MASTER_ADDR` …, as torchrun does).

    Under torchrun the agent hosts the store, so it outlives any rank. Other launchers: rank 0 hosts it.

    Raises:
        WrongUse: The store cannot be opened: a port in use, or nobody listening.
    """
    try:
        place = read_torch_place()
    except ValueError as error:
        raise WrongUse(
            f"RANK is set, but WORLD_SIZE or another variable is missing or no number: {error}"
        ) from None
    if place is None:
        return World()
    world = World(place.rank, place.num_ranks, place.local_rank, place.num_local)
    if world.world_size == 1:
        return world
    hosts = world.rank == 0 and not has_agent_store()
    store, group_store = _open_store(world.rank, hosts), _open_store(world.rank, False)
    return dataclasses.replace(world, store=store, group_store=group_store, hosts_store=hosts)


_hosted: dict[tuple[str, str], dist.Store] = {}  # by address and port: a process hosts a store once


def _open_store(rank: int, hosts: bool) -> dist.Store:
    host, port = read_address()
    address, port = host or "127.0.0.1", port or "29500"
    hosts = hosts and (address, port) not in _hosted
    try:
        if not hosts:
            _await_listener(rank, address, int(port))
        store = dist.TCPStore(
            address,
            int(port),
            world_size=None,
            is_master=hosts,
            timeout=timedelta(seconds=CONNECT_SECONDS),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        raise WrongUse(
            f"rank {rank} cannot open the store at {address}:{port}: {str(error).splitlines()[0]}\n"
            "If another program uses the port, choose a free one (MASTER_PORT, torchrun --master-port), or let "
            "torchrun choose: torchrun --standalone --nproc-per-node 2 …"
        ) from None
    if hosts:
        _hosted[address, port] = store
    # A restarted attempt must not meet the keys of the one that failed.
    return dist.PrefixStore(f"ddpcall/attempt{read_attempt()}", store)


def _await_listener(rank: int, address: str, port: int) -> None:
    """Wait until somebody listens: torch tries again and again beyond its timeout.

    Raises:
        NobodyListens: Nobody does in time.
    """
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return socket.create_connection((address, port), timeout=5.0).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise NobodyListens(
                    f"rank {rank} waited {CONNECT_SECONDS:.0f} s, and nobody listens at "
                    f"{address}:{port} ({error.strerror or error}). Start rank 0, or the launcher, with the same "
                    "MASTER_ADDR and MASTER_PORT"
                ) from None
        time.sleep(0.1)


def choose_accelerator(device: str, backend: str, local_rank: int, local_world_size: int) -> Accelerator:
    """Choose device and backend for this rank, as `ddpcall.accelerator` does.

    Raises:
        WrongUse: A device or backend that is not there.
    """
    try:
        return accelerator.choose_accelerator(device, backend, local_rank, local_world_size)
    except ValueError as error:
        raise WrongUse(str(error)) from None


@contextlib.contextmanager
def process_group(
    world: World, chosen: Accelerator, name: str, timeout_s: float
) -> Generator[dist.ProcessGroup | None]:
    """Open a fresh default process group, and yield a gloo group for the probes beside it; None in a world of one.

    A world of one still gets a default group, since DDP asks for one. On exit, whatever held on to DDP objects
    must be gone: they are collected before the group is destroyed (a DDP freed later can hang the process;
    pytorch #56297).
    """
    store = dist.PrefixStore(name, world.group_store) if world.group_store is not None else dist.HashStore()
    timeout = timedelta(seconds=timeout_s)
    options: dict[str, Any] = {} if chosen.backend == CPU_BACKEND else {"device_id": chosen.device}
    dist.init_process_group(
        chosen.backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout, **options
    )
    try:
        probe_group: Any = None
        if world.world_size > 1:
            probe_group = dist.new_group(backend="gloo", timeout=timeout, group_desc="probes")
        world.publish(f"{name}/connected", True)
        try:
            yield probe_group
        finally:
            # A trial that crashes at once would close connections that a slower rank is still making.
            world.wait_for(f"{name}/connected", CONNECTED_SECONDS)
    finally:
        gc.collect()
        dist.destroy_process_group()
        # What is left now are modules and caches. Looking through them again would be most of the next collection.
        gc.freeze()


def launch_local_ranks(function: Callable[..., int], num_ranks: int, *args: Any) -> int:
    """Run `function(*args)` on fresh local ranks, with torch's own launcher, and return the worst exit code.

    Args:
        function: Importable by name; returns an exit code on every rank.
        num_ranks: How many processes.
        *args: Picklable arguments.

    Raises:
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: A rank died or raised.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: one thread a rank
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=f"ddpcall-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    with _without_torchrun_variables():
        results = elastic_launch(launch, function)(*args)
    return max(results.values())


@contextlib.contextmanager
def _without_torchrun_variables() -> Generator[None]:
    """Hide an outer torchrun's variables, which would reach the new ranks and mislead their rendezvous."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if is_of_a_launch(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)
