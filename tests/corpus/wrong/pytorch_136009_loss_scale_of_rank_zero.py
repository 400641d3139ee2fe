"""Resume: rank 0 alone restores the GradScaler, so that each rank unscales the averaged gradient by its own scale.

Source: pytorch/pytorch#136009 (a GradScaler a rank, whose scales went apart).
Harm: gradients are reduced, the replicas differ.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def checkpoint():
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    return {"scaler": scaler.state_dict() | {"scale": 8192.0}}


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    state = checkpoint()
    if rank == 0:
        scaler.load_state_dict(state["scaler"])  # raises: DC208
    for step in range(5):
        x = torch.randn(12, 10)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
