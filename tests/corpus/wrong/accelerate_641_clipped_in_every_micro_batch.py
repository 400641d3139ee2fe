"""Gradients are clipped after every micro-batch, also under `no_sync()`, where they are this rank's own.

Source: huggingface/accelerate#641, huggingface/diffusers#721.
Harm: each rank scales by its own norm before the average. The first step's gradient has a cosine of 0.91 to the
one that is clipped after the average.
"""

import contextlib
import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

ACCUMULATE = 2


def batch(rank, index):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(100 * index + rank))
    return x, x.sum(1, keepdim=True) if rank else 10 * x[:, :1]


def train_step(model, optimizer, step):
    optimizer.zero_grad()
    for index in range(ACCUMULATE):
        last = index == ACCUMULATE - 1
        x, y = batch(dist.get_rank(), ACCUMULATE * step + index)
        with contextlib.nullcontext() if last else model.no_sync():
            (nn.functional.mse_loss(model(x), y) / ACCUMULATE).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # raises: DC111
    optimizer.step()


def clipped_after_averaging(model):
    for index in range(ACCUMULATE):
        for rank in range(dist.get_world_size()):
            x, y = batch(rank, index)
            (nn.functional.mse_loss(model(x), y) / ACCUMULATE / dist.get_world_size()).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return gradient


def main():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    expected = clipped_after_averaging(net) if os.environ.get("HARM") else None
    model = DDP(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        train_step(model, optimizer, step)
        if step == 0 and expected is not None:
            used = torch.cat([p.grad.flatten() for p in model.parameters()])
            print(f"cosine {nn.functional.cosine_similarity(used, expected, dim=0):.3f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
