"""Metric learning: a loss's proxies are outside the wrapper, trained on each rank's own batch with a small rate.

Source: the pattern that pytorch-metric-learning documents, without its `DistributedLossWrapper`.
Harm: every rank has proxies of its own, however small the steps that take them apart.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class ProxyLoss(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(classes, width))

    def forward(self, embeddings, labels):
        logits = nn.functional.normalize(embeddings) @ nn.functional.normalize(self.proxies).T
        return nn.functional.cross_entropy(8 * logits, labels)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16)))
    criterion = ProxyLoss(8, 16)
    groups = [{"params": model.parameters()}, {"params": criterion.parameters(), "lr": 1e-6}]
    optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.9)  # raises: DC102
    torch.manual_seed(rank + 1)
    for step in range(4):
        labels = torch.randint(0, 8, (48,))
        x = torch.randn(48, 8) + nn.functional.one_hot(labels, 8)
        loss = criterion(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
