"""Rank 0 evaluates through `.module` under no_grad, in eval mode, and switches back.

Source: pytorch/pytorch#54059 and #53979 (the maintainers recommend `ddp.module(x)` for evaluation on one rank).
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


@torch.no_grad()
def evaluate(ddp, images, labels):
    ddp.eval()
    logits = ddp.module(images)
    ddp.train()
    return (logits.argmax(1) == labels).float().mean().item()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    ddp = DDP(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4)))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(5):
        x = torch.randn(16, 8)
        loss = nn.functional.cross_entropy(ddp(x), x[:, :4].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 2 == 0:
            x = torch.randn(64, 8)
            print(f"step {step} accuracy {evaluate(ddp, x, x[:, :4].argmax(1)):.3f}", flush=True)
        dist.barrier()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
