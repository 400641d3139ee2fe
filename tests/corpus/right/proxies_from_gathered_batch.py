"""Metric learning: a loss's proxies are outside the wrapper, and every rank computes them from the gathered batch.

Source: the pattern that pytorch-metric-learning documents (`DistributedLossWrapper`).
Right because every rank sees the same embeddings and labels: the proxies' gradients are equal but for the order in
which they were summed, and so are the proxies.
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


def gather(mine):
    """All ranks' rows, this rank's first: those alone carry gradients."""
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine.detach())
    del rows[dist.get_rank()]
    return torch.cat([mine, *rows])


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16)))
    criterion = ProxyLoss(8, 16)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.5, momentum=0.9)
    torch.manual_seed(rank + 1)
    for _ in range(20):
        labels = torch.randint(0, 8, (48,))
        x = torch.randn(48, 8) + nn.functional.one_hot(labels, 8)
        loss = criterion(gather(model(x)), gather(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    proxies = gather(criterion.proxies)
    apart = (proxies[:8] - proxies[8:]).abs().max().item()
    assert apart < 1e-4
    print(f"rank {rank} loss {loss.item():.4f} largest difference {apart:.1e}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
