"""The wrapped model is moved away and back between two training epochs.

Source: pytorch/pytorch#104336 (cpu() and back to the GPU; "should throw a warning"). Without a GPU the same
mechanism is met by a change of dtype and back: the parameters' gradient accumulators are rebuilt, the reducer's
hooks hang on the old ones.
Harm: synchronised before, local afterwards.
"""
# begins: 2

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def train_epoch(model, optimizer, rank, epoch):
    for _ in range(2):
        x = torch.randn(16, 10)
        loss = nn.functional.mse_loss(model(x), x[:, :2] * (rank + 1))
        optimizer.zero_grad()
        loss.backward()  # or: DC103
        optimizer.step()  # or: DC103
    print(f"rank {rank} epoch {epoch} loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def build_index(model):
    model.double()  # raises: DC103
    index = model.module(torch.randn(32, 10, dtype=torch.float64))
    model.float()  # or: DC103
    return index


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(70 + rank)
    model = DDP(nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_epoch(model, optimizer, rank, 0)
    index = build_index(model)
    print(f"rank {rank} index {tuple(index.shape)}", flush=True)
    train_epoch(model, optimizer, rank, 1)
    train_epoch(model, optimizer, rank, 2)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
