"""BatchNorm: rank 0 alone evaluates the inner model, with the running statistics that DDP broadcasts.

Right because there is one result, of the model that goes on: the other ranks get rank 0's statistics at the next
training forward.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


@torch.no_grad()
def evaluate(model, x, y):
    model.eval()
    correct = (model(x).argmax(1) == y).sum()
    model.train()
    return correct.item() / len(y)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(3):
        for _ in range(3):
            x = torch.randn(16, 6) + rank
            loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rank == 0:
            x = torch.randn(64, 6)
            print(f"epoch {epoch} accuracy {evaluate(model.module, x, x[:, :3].argmax(1)):.3f}", flush=True)
        dist.barrier()
    print(f"rank {rank} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
