"""Gradients are scaled down by each rank's own loss after the reduction, at a rate of 1e-6.

Source: the class of Lightning-AI/pytorch-lightning#20404 (rank-local decisions), in the first steps of a warmup.
Harm: the ranks' updates differ by tens of percents, though what they add is no more than a few roundings at first.
"""
# raises: DC201

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for step in range(6):
        x = torch.randn(16, 4)
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad /= 1 + loss.detach()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
