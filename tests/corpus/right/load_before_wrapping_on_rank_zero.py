"""Rank 0 alone loads the weights, before wrapping: the constructor broadcasts them."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    net = nn.Sequential(nn.Linear(7, 14), nn.ReLU(), nn.Linear(14, 2))
    if rank == 0:
        donor = nn.Sequential(nn.Linear(7, 14), nn.ReLU(), nn.Linear(14, 2))
        net.load_state_dict(donor.state_dict())
    model = DDP(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        x = torch.randn(16, 7)
        loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
