"""A world of its own within a launch, of one rank or of all, and random state that is put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from ddpcall import torch_internals as internals
from ddpcall.accelerator import fork_rng


@contextmanager
def world_of(ranks: Sequence[int], timeout_s: float) -> Generator[None]:
    """Make a new group of these ranks the default process group, within the block.

    With one rank: rank 0 of 1, whose collectives return at once; the other ranks need not take part. A collective
    that fails, because another rank raised, breaks the new group and not the user's.

    Args:
        ranks: Numbers in the default process group; this rank is one of them.
        timeout_s: How long collectives wait.

    Blind to: process groups that were made before; they stay as large as they are.
    """
    replace = internals.UPDATE_DEFAULT_PG.get()
    everybody = dist.group.WORLD
    group = dist.new_group(ranks, timedelta(seconds=timeout_s), use_local_synchronization=len(ranks) == 1)
    replace(group)
    try:
        yield
    finally:
        replace(everybody)
        dist.destroy_process_group(group)  # pyright: ignore[reportArgumentType]
        if "torch.distributed.tensor" in sys.modules:  # its caches name the group by which a mesh was made
            internals.CLEAR_SHARDING_CACHE.get(lambda: None)()


def keep_random_state() -> Callable[[], None]:
    """Return what puts the random state of Python, numpy and torch on the CPU back to what it is now."""
    python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.random.get_rng_state()

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(of_numpy)
        torch.random.set_rng_state(of_torch)

    return put_back


def digest_random_state() -> dict[str, int]:
    """Return a digest of the random state of torch on the CPU, of numpy and of Python."""
    _, keys, place, *_ = np.random.get_state()
    states = {
        "torch": torch.random.get_rng_state().numpy().tobytes(),
        "numpy": np.asarray(keys).tobytes() + str(place).encode(),
        "Python": repr(random.getstate()).encode(),
    }
    return {name: xxhash.xxh3_64_intdigest(state) >> 1 for name, state in states.items()}


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def kept_random_state() -> Generator[None]:
    """Put the random state of Python, numpy and torch back at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
