"""The optimizer is made of the model, and then a copy of the model is wrapped and trained.

Source: the order of lines in many "loss does not decrease" threads: optimizer first, then `copy.deepcopy` and DDP.
Harm: the optimizer holds none of the wrapped model's parameters: the loss of a fixed batch never changes.
"""

import copy
import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = dist.get_rank()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)  # raises: DC109
    model = DDP(copy.deepcopy(net))
    torch.manual_seed(1 + rank)
    for step in range(10):
        model.zero_grad()
        model(torch.randn(8, 8)).square().mean().backward()
        optimizer.step()
        if step in (0, 9):
            print(f"rank {rank} loss {model.module(torch.ones(1, 8)).item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
