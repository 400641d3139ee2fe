"""The hook-based `replicate`, accumulating: the last micro-batch before the step is not synchronised either.

Source: karpathy/build-nanogpt#30 (the flag set one micro-batch off), on torch.distributed._composable.replicate,
whose switch is `set_requires_gradient_sync`.
Harm: every step uses gradients of this rank alone.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable import replicate


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 1))
    replicate(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(10 + rank)
    for step in range(4):
        optimizer.zero_grad()
        for micro in range(3):
            model.set_requires_gradient_sync(micro == 3)  # raises: DC104
            x = torch.randn(16, 6)
            y = x.sum(dim=1, keepdim=True) * (rank + 1)
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
