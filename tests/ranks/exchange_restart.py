"""A script for torchrun: rank 1 is killed in the first attempt; rank 0 of the second prints what it saw."""

import os
import signal

import torch.distributed as dist
from torch.distributed import PrefixStore

from ddpcall.watch.compare.exchange import Exchange, find_store
from ddpcall.watch.compare.vitals import PARTS, Vitals

if __name__ == "__main__":
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    store = find_store()
    assert store is not None
    exchange = Exchange(store, rank, world_size, wait_s=10)
    group_store = PrefixStore(f"attempt{attempt}", store)
    dist.init_process_group("gloo", store=group_store, rank=rank, world_size=world_size)
    for step in range(1, 6):
        exchange.publish(Vitals(step, dict.fromkeys(PARTS, step + attempt)))
        dist.barrier()
        if attempt == 0 and step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    comparisons = [exchange.compare(step, wait=True) for step in range(1, 6)]
    if rank:
        exchange.leave()
        exchange.serve()
    if rank == 0:
        print(
            attempt,
            [(found.step, found.missing, found.same == PARTS) for found in comparisons if found],
            flush=True,
        )
    exchange.close()
    dist.barrier()
    dist.destroy_process_group()
