"""torch.compile around DDP, called; the inner module only serves for saving."""

import gc
import io
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    ddp = DDP(nn.Sequential(nn.Linear(6, 18), nn.ReLU(), nn.Linear(18, 3)))
    model = torch.compile(ddp, backend="eager")
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    for step in range(5):
        x = torch.randn(16, 6)
        loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)
    if rank == 0:
        torch.save(ddp.module.state_dict(), io.BytesIO())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
