"""Gradients taken with `torch.autograd.grad` and written to `.grad` by hand.

Source: pytorch/pytorch#63929 and #47562 (with autograd.grad the reducer's hooks do not run).
Harm: the forward armed the reducer, but no gradient ever accumulates, so nothing is reduced.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Potential(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 24), nn.Softplus(), nn.Linear(24, 1))

    def forward(self, positions):
        return self.net(positions).sum(dim=-1)


def train_step(model, optimizer, positions, energies):
    loss = nn.functional.mse_loss(model(positions), energies)
    params = list(model.parameters())
    grads = torch.autograd.grad(loss, params)  # raises: DC101
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clamp(-1, 1)
    optimizer.step()  # or: DC101
    return loss.item()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(2 * rank)
    model = DDP(Potential())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(4):
        positions = torch.randn(20, 3)
        loss = train_step(model, optimizer, positions, positions.pow(2).sum(-1))
        print(f"rank {rank} step {step} loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
