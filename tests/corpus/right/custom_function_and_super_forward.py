"""The same on two ranks: `.forward` inside the wrapped model's own forward, with no hooks to lose."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(4, 12)

    def forward(self, x):
        return torch.relu(self.inp.forward(x))


class Quantised(Base):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        hidden = super().forward(x)
        return self.out(StraightThrough.apply(4 * hidden) / 4)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(Quantised())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(4):
        x = torch.randn(16, 4)
        loss = nn.functional.mse_loss(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
