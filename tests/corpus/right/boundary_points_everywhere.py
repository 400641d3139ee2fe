"""A physics-informed network: points inside are drawn by each rank, the boundary is the same everywhere.

Source: the usual loss of such networks (Raissi et al. 2019): two forwards and one backward a step.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    u = DDP(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)))
    optimizer = torch.optim.Adam(u.parameters(), lr=1e-3)
    boundary = torch.tensor([[0.0], [1.0]])
    torch.manual_seed(1 + rank)
    for step in range(6):
        x = torch.rand(32, 1, requires_grad=True)
        (slope,) = torch.autograd.grad(u(x).sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        loss = (curvature + x.sin()).square().mean() + u(boundary).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
