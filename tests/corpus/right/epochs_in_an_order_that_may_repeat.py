"""Orders that repeat and may: nothing is shuffled, nothing is trained, or another optimizer trains."""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def evaluate(model, loader):
    model.eval()
    with torch.no_grad():
        total = sum(nn.functional.mse_loss(model(x), y, reduction="sum") for x, y in loader)
    model.train()
    dist.all_reduce(total)
    return total.item()


def train(model, loader, optimizer):
    for x, y in loader:
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main():
    torch.manual_seed(3)
    x = torch.randn(64, 6)
    dataset, held_out = TensorDataset(x, x.cumsum(1)), TensorDataset(x[:32].flip(0), x[:32].cumsum(1))
    in_order = DataLoader(dataset, batch_size=8, sampler=DistributedSampler(dataset, shuffle=False))
    shuffled = DataLoader(dataset, batch_size=8, sampler=DistributedSampler(dataset))
    evaluated = DataLoader(held_out, batch_size=8, sampler=DistributedSampler(held_out))
    model = DDP(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)))
    head = torch.optim.SGD(model.module[2].parameters(), lr=0.01)
    body = torch.optim.SGD(model.module[0].parameters(), lr=0.01)
    example, _ = next(iter(shuffled))
    for epoch in range(2):
        train(model, in_order, head)
        shuffled.sampler.set_epoch(epoch)
        train(model, shuffled, head)
        train(model, shuffled, body)
        print(f"rank {dist.get_rank()} {len(example)} loss {evaluate(model, evaluated):.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
