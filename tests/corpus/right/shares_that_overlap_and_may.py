"""Samples that come twice and may: for shares of one size, in each rank's own order, drawn by weight, in a dataset
of each rank's own; and shares that other samplers give."""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset, WeightedRandomSampler


class OwnOrder(DistributedSampler):
    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


def samples(num, seed=3):
    x = torch.randn(num, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.cumsum(1))


def build_loaders(rank):
    shared, own = samples(61), samples(64, seed=rank)
    draws = torch.Generator().manual_seed(7 + rank)
    samplers = [
        (shared, DistributedSampler(shared)),
        (shared, DistributedSampler(shared, num_replicas=1, rank=0, seed=rank)),
        (own, DistributedSampler(own, num_replicas=1, rank=0)),
        (shared, RandomSampler(shared, generator=draws)),
        (shared, WeightedRandomSampler([1.0] * 61, 61, generator=draws)),
        (shared, OwnOrder(shared, seed=rank)),
        *((shared, DistributedSampler(shared, num_replicas=4, rank=2 * half + rank)) for half in range(2)),
    ]
    return [DataLoader(data, batch_size=8, sampler=sampler) for data, sampler in samplers]


def main():
    rank = dist.get_rank()
    torch.manual_seed(rank)
    evaluated = samples(64, seed=5)
    evaluation = DataLoader(evaluated, batch_size=8, sampler=DistributedSampler(evaluated, seed=rank))
    model = DDP(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for loader in build_loaders(rank):
        for inputs, target in loader:
            loss = nn.functional.mse_loss(model(inputs), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            error = sum(nn.functional.mse_loss(model(x), y) for x, y in evaluation)
        dist.all_reduce(error)
        print(f"rank {rank} loss {loss.item():.4f} error {error.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
