"""Rank 0 evaluates and saves for a long time while the others wait in a barrier, and once in the next backward.

Correct: a slow rank is no hang; all ranks run the same collectives.
"""
# hang-after: 1

import gc
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def evaluate(model):
    begun = time.monotonic()
    while time.monotonic() - begun < 2.0:
        with torch.no_grad():
            model.module(torch.randn(64, 4))


def main():
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = DDP(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(6):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        if rank == 0 and step in (2, 4):
            evaluate(model)
        if step == 2:
            dist.barrier()
    print(f"rank {rank} end", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
