"""The hook-based `replicate`: calling `.forward` instead of the module skips the hooks that arm the reducer.

Source: karpathy/nanoGPT#475 (a proposal to write `self.forward(x)` "for readability"), on
torch.distributed._composable.replicate, the one flavour of data parallelism where the folk rule is literally
true.
Harm: gradients stay local; on the first step too, since the reducer is only built by a call.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable import replicate


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 24)
        self.fc2 = nn.Linear(24, 1)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = MLP()
    replicate(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(10 + rank)
    for step in range(4):
        x = torch.randn(16, 6)
        y = x.sum(dim=1, keepdim=True) * (rank + 1)
        loss = nn.functional.mse_loss(model.forward(x), y)  # raises: DC101
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
