"""Replicas that start from different weights.

Source: Lightning-AI/pytorch-lightning#3628 and #6013 ("at least check if the weights are the same and if not
warn").
Adapted: since torch 1.x DDP broadcasts rank 0's weights when it wraps, so seeds alone do no harm. They do when
that broadcast is switched off to save start-up time (`init_sync=False`).
Harm: gradients are reduced and equal; the parameters differ for ever.
"""
# raises: DC201

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(7, 21)
        self.output = nn.Linear(21, 1)

    def forward(self, x):
        return self.output(torch.relu(self.hidden(x)))


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(1000 + rank)
    model = DDP(Regressor(), init_sync=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(5):
        x = torch.randn(16, 7)
        loss = nn.functional.huber_loss(model(x), x.norm(dim=1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
