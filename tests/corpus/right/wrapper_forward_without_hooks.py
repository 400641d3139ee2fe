"""`ddp.forward(x)`: the reducer is armed in DDP.forward itself, and no hook hangs on the wrapper to be lost."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    ddp = DDP(nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14, 3)))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    for step in range(4):
        x = torch.randn(8, 2, 16)
        loss = nn.functional.cross_entropy(ddp.forward(x), torch.randint(0, 3, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
