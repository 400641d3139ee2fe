"""Several local steps under no_sync, then an outer optimizer on the average of what each rank has moved.

Source: DiLoCo (arXiv 2311.08105).
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
    shared = [p.detach().clone() for p in model.parameters()]
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    outer = torch.optim.SGD(shared, lr=0.7, momentum=0.9, nesterov=True)
    torch.manual_seed(1 + rank)
    for turn in range(4):
        with model.no_sync():
            for _ in range(3):
                x = torch.randn(16, 8)
                loss = nn.functional.mse_loss(model(x), x)
                inner.zero_grad()
                loss.backward()
                inner.step()
        with torch.no_grad():
            for start, now in zip(shared, model.parameters(), strict=True):
                start.grad = start - now
                dist.all_reduce(start.grad)
                start.grad /= dist.get_world_size()
            outer.step()
            for start, now in zip(shared, model.parameters(), strict=True):
                now.copy_(start)
        print(f"rank {rank} turn {turn} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
