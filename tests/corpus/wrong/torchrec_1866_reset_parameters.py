"""Layers are initialised anew after wrapping, each rank with its own random numbers.

Source: meta-pytorch/torchrec#1866 (reset_parameters after the model was wrapped).
Harm: the broadcast of the constructor is over; gradients are reduced, the replicas differ.
"""
# raises: DC201

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Ranker(nn.Module):
    def __init__(self, rows=50, dim=8):
        super().__init__()
        self.table = nn.EmbeddingBag(rows, dim, mode="mean")
        self.over = nn.Linear(dim, 1)

    def reset_parameters(self):
        self.table.reset_parameters()
        self.over.reset_parameters()

    def forward(self, ids):
        return self.over(self.table(ids))[:, 0]


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(90 + rank)
    model = DDP(Ranker())
    model.module.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(4):
        ids = torch.randint(0, 50, (16, 5))
        labels = (ids.sum(1) % 2).float()
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
