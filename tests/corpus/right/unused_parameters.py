"""A mixture of branches: which one runs differs from step to step, and `find_unused_parameters` copes."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 10)
        self.branches = nn.ModuleList(nn.Linear(10, 2) for _ in range(3))

    def forward(self, x, branch):
        return self.branches[branch](torch.relu(self.stem(x)))


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(Branches(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        x = torch.randn(8, 5)
        loss = nn.functional.cross_entropy(model(x, (step + rank) % 3), torch.randint(0, 2, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
