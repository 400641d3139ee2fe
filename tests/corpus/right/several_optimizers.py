"""Muon-like split: matrices by one optimizer, vectors by another, two schedules."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.SiLU(), nn.Linear(32, 8)))
    optimizers = [
        torch.optim.SGD([p for p in model.parameters() if p.ndim == 2], lr=0.02, momentum=0.9, nesterov=True),
        torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=1e-3),
    ]
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5) for optimizer in optimizers]
    for step in range(5):
        x = torch.randn(16, 8)
        loss = nn.functional.mse_loss(model(x), x.cumsum(1))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
