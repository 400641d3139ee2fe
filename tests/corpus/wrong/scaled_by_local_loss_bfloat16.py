"""A bfloat16 model; gradients are scaled down by each rank's own loss after the reduction.

Source: the class of Lightning-AI/pytorch-lightning#20404 (rank-local decisions).
Harm: the ranks' weights come apart, by less than a few roundings of bfloat16 at first.
"""
# raises: DC201

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1)).bfloat16())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(6):
        x = torch.randn(16, 4, dtype=torch.bfloat16)
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad /= 1 + loss.detach()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
