"""Adversarial training: the attack runs on the inner module for the input's gradient; its parameter gradients
are
thrown away before the real step, which goes through the wrapper."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def fgsm(module, x, y, epsilon=0.05):
    x = x.clone().requires_grad_()
    nn.functional.cross_entropy(module(x), y).backward()
    return (x + epsilon * x.grad.sign()).detach()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        x = torch.randn(16, 8)
        y = x[:, :4].argmax(1)
        attacked = fgsm(model.module, x, y)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(attacked), y)
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
