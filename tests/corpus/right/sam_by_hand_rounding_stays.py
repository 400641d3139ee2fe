"""SAM by hand, nothing averaged afterwards: each rank's own uphill step is taken back, but for its rounding.

Right because the step itself uses reduced gradients: the ranks stay together to some roundings a step, 1e-7 of the
weights, while training moves them a thousand times as far.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def uphill(ddp, x, y, radius):
    """Climbs along this rank's own gradient; returns what was added."""
    with ddp.no_sync():
        nn.functional.mse_loss(ddp(x), y).backward()
    gradients = [p.grad.clone() for p in ddp.parameters()]
    scale = radius / torch.cat([g.flatten() for g in gradients]).norm()
    steps = [g.mul_(scale) for g in gradients]
    with torch.no_grad():
        for parameter, step in zip(ddp.parameters(), steps, strict=True):
            parameter.add_(step)
    ddp.zero_grad()
    return steps


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    ddp = DDP(nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1)))
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    for step in range(24):
        x = torch.randn(16, 6)
        y = x.sum(1, keepdim=True)
        climbed = uphill(ddp, x, y, radius=0.3)
        loss = nn.functional.mse_loss(ddp(x), y)
        loss.backward()
        with torch.no_grad():
            for parameter, climb in zip(ddp.parameters(), climbed, strict=True):
                parameter.sub_(climb)
        optimizer.step()
        optimizer.zero_grad()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
