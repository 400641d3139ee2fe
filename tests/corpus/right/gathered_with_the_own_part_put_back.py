"""A contrastive loss over all ranks' features, where each rank puts its own part back before the loss.

Correct: both operands of this rank's samples have their gradient, and DDP averages over the ranks.
"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def own_part(gathered, features):
    gathered[dist.get_rank()] = features
    return gathered


def gather(features):
    gathered = [torch.empty_like(features) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, features)
    return torch.cat(own_part(gathered, features))


def main():
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1 + rank)
    for _ in range(6):
        x = torch.randn(8, 12)
        first, second = F.normalize(model(torch.cat([x, x + 0.1 * torch.randn(8, 12)])), dim=1).chunk(2)
        labels = torch.arange(8) + 8 * rank
        loss = F.cross_entropy(first @ gather(second.contiguous()).T / 0.2, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"rank {rank} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
