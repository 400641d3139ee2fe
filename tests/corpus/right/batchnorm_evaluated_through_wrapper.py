"""BatchNorm: evaluation goes through the wrapper, which broadcasts the running statistics first."""

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
    for epoch in range(2):
        for _ in range(2):
            x = torch.randn(16, 6) + rank
            loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x = torch.randn(64, 6)
        accuracy = evaluate(model, x, x[:, :3].argmax(1))
        print(f"rank {rank} epoch {epoch} loss {loss.item():.4f} accuracy {accuracy:.3f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
