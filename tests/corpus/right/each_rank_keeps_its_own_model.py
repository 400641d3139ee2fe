"""An ensemble: every rank trains a model of its own, seeded with its rank."""

import gc

import torch
import torch.distributed as dist
from torch import nn


def main():
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3 + rank)
    net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    torch.manual_seed(10 + rank)
    for _ in range(6):
        x = torch.randn(16, 6)
        loss = nn.functional.mse_loss(net(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"rank {rank} of {world} loss {loss.item():.5f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
