"""The class's forward is called with the inner module as `self`.

Source: karpathy/nanoGPT#475's way of thinking (the call and `.forward` are the same), in its most literal form.
Harm: neither wrapper nor `__call__` is involved; gradients stay local.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Block(nn.Module):
    def __init__(self, dim=12):
        super().__init__()
        self.ln = nn.LayerNorm(dim)
        self.mlp = nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.mlp(self.ln(x)).tanh()


def apply_block(ddp, x):
    return Block.forward(ddp.module, x)  # raises: DC101


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(3 + rank)
    ddp = DDP(Block())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(4):
        x = torch.randn(10, 12)
        loss = (apply_block(ddp, x) - x.flip(1)).pow(2).mean()  # or: DC101
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
