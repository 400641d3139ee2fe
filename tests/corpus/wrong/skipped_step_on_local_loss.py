"""A step is skipped where the rank's own loss looks like an outlier.

Source: the class of Lightning-AI/pytorch-lightning#20404 (rank-local decisions), here at the optimizer step.
Harm: the rank that skips keeps its old weights and is a step behind for ever.
"""
# begins: 1
# raises: DC201|DC502

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(6):
        x = torch.randn(16, 4)
        scale = 50.0 if (step, rank) == (1, 1) else 1.0
        loss = nn.functional.mse_loss(model(x), scale * x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        if loss.item() < 1000:
            optimizer.step()  # raises: DC502
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
