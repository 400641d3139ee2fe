"""The exchange: every rank leaves its record on the default store and reads the others', within a time limit.

No collective: ranks that took fewer steps, or none, hold nobody up in a group's operation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed import PrefixStore

from ddpcall import torch_internals as internals
from ddpcall.launch_environment import read_attempt

_MAX_PAUSE_S = 0.02


class RanksMissing(RuntimeError):
    """Some ranks did not come to the end of their block in time."""

    def __init__(self, missing: Sequence[int], timeout_s: float) -> None:
        super().__init__(
            f"ranks {', '.join(map(str, missing))} did not come to the end of their `with` block within "
            f"{timeout_s:g} s. All ranks must measure the same step: write the `with` on every rank, or give "
            "slower ranks more time with timeout_s=…"
        )
        self.missing = tuple(missing)


def exchange_records(data: bytes, timeout_s: float, *, wait: bool = True) -> list[bytes]:
    """Leave this rank's bytes, return those of all ranks in rank order.

    Every rank's n-th call belongs together.

    Args:
        data: What this rank leaves.
        timeout_s: Seconds to wait for the others.
        wait: False to leave only, and return nothing.

    Raises:
        RanksMissing: others did not call within the time limit.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    attempt = read_attempt()
    store = PrefixStore(f"ddpcall/mixing/{attempt}", internals.GET_DEFAULT_STORE.get()())
    number = store.add(f"calls/{rank}", 1)
    store.set(f"{number}/{rank}", data)  # pyright: ignore[reportArgumentType]  # bytes are taken
    if not wait:
        return []
    deadline_s = time.monotonic() + timeout_s
    pause_s = 0.0005
    waiting = [other for other in range(num_ranks) if other != rank]
    while waiting := [other for other in waiting if not store.check([f"{number}/{other}"])]:
        if time.monotonic() > deadline_s:
            raise RanksMissing(waiting, timeout_s)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _MAX_PAUSE_S)
    records = [data if other == rank else store.get(f"{number}/{other}") for other in range(num_ranks)]
    # Who has read this call's records has read all earlier ones, and so has everybody whose record is here.
    if number > 1:
        store.delete_key(f"{number - 1}/{rank}")
    return records
