"""Evaluations over shares that are summed up right: even ones, with the surplus left out or dropped, each sample
once; and a training epoch whose samples are counted."""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset


def evaluate(model, loader, num_own=None):
    model.eval()
    total = torch.zeros(2)
    with torch.no_grad():
        for inputs, target in loader:
            errors = nn.functional.mse_loss(model.module(inputs), target, reduction="none").mean(1)
            if num_own is not None:
                errors = errors[: num_own - int(total[1])]
            total += torch.tensor([errors.sum(), len(errors)])
    model.train()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def train(model, loader, optimizer):
    total = torch.zeros(2)
    for inputs, target in loader:
        loss = nn.functional.mse_loss(model(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += torch.tensor([loss.item() * len(inputs), len(inputs)])
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def main():
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3 + rank)
    x = torch.randn(61, 6, generator=torch.Generator().manual_seed(3))
    odd, even = TensorDataset(x, x.cumsum(1)), TensorDataset(x[:60], x[:60].cumsum(1))
    own = range(rank, 61, world_size)
    model = DDP(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)))
    optimizer = torch.optim.Adam(model.parameters())
    sampler = DistributedSampler(odd)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        loss = train(model, DataLoader(odd, batch_size=8, sampler=sampler), optimizer)
        errors = [
            evaluate(model, DataLoader(even, 8, sampler=DistributedSampler(even, shuffle=False))),
            evaluate(model, DataLoader(odd, 8, sampler=DistributedSampler(odd, shuffle=False)), len(own)),
            evaluate(model, DataLoader(odd, 8, sampler=DistributedSampler(odd, shuffle=False, drop_last=True))),
            evaluate(model, DataLoader(Subset(odd, own), 8)),
        ]
        print(f"rank {rank} loss {loss:.4f} errors {errors}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
