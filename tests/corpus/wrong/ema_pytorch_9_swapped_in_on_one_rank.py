"""Rank 0 loads the averaged weights for an evaluation and goes on training with them.

Source: lucidrains/ema-pytorch#9 and HorizonRobotics/alf#1475 (averages and targets kept per rank).
Harm: rank 0's parameters are the average's from then on, the others' are not.
"""
# begins: 2

import copy
import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def evaluate_average(model, average, rank):
    if rank == 0:
        model.module.load_state_dict(average.state_dict())  # raises: DC202
        with torch.no_grad():
            print(f"checksum {model.module(torch.ones(1, 6)).sum():.4f}", flush=True)
    dist.barrier()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2)))
    average = copy.deepcopy(model.module)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(5):
        x = torch.randn(8, 6)
        loss = nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 0.1)
        if step == 1:
            evaluate_average(model, average, rank)  # or: DC202
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
