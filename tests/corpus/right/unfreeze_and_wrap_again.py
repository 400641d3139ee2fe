"""Unfreezing done right: the model is wrapped again, the optimizer made anew.

Source: the mended form of Lightning-AI/pytorch-lightning#20340.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def run(model, rank, stage, steps=3):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        x = torch.randn(16, 6)
        loss = nn.functional.cross_entropy(model(x), x[:, :2].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} stage {stage} step {step} loss {loss.item():.4f}", flush=True)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    net = nn.Sequential(nn.Linear(6, 18), nn.ReLU(), nn.Linear(18, 2))
    net[0].requires_grad_(False)
    run(DDP(net), rank, "head")
    net[0].requires_grad_(True)
    run(DDP(net), rank, "all")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
