"""fully_shard with accumulation: the switch is put back after the optimizer step, one micro-batch too late.

Source: karpathy/build-nanogpt#30 (the flag of an accumulation set one micro-batch off), on fully_shard, whose
switch is `set_requires_gradient_sync`.
Harm: the step that should use the accumulated gradients has none: nothing is trained in it.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = nn.Sequential(Block(8), Block(8), nn.Linear(8, 1))
    for block in model[:2]:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(10 + rank)
    for step in range(3):
        for _ in range(2):
            model.set_requires_gradient_sync(False)  # raises: DC104
            x = torch.randn(4, 8)
            loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.set_requires_gradient_sync(True)
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
