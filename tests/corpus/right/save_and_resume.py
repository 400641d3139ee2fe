"""Rank 0 saves `model.module.state_dict()`, every rank loads it, the optimizer's state too."""

import gc
import io
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def steps(model, optimizer, rank, count):
    for step in range(count):
        x = torch.randn(8, 5)
        loss = nn.functional.mse_loss(model(x), x.cumsum(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 5)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    steps(model, optimizer, rank, 3)
    payload = [None]
    if rank == 0:
        stream = io.BytesIO()
        torch.save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}, stream)
        payload = [stream.getvalue()]
    dist.broadcast_object_list(payload, src=0)
    checkpoint = torch.load(io.BytesIO(payload[0]), weights_only=True)
    model.module.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    steps(model, optimizer, rank, 3)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
