"""Gradients are averaged without waiting, and by a slip the step takes those of the step before.

Source: our own.
Harm: every update is computed from the batch before the last update.
"""
# begins: 2

import gc

import torch
import torch.distributed as dist
from torch import nn


def main():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    torch.manual_seed(10 + dist.get_rank())
    under_way = []
    for _ in range(7):
        x = torch.randn(16, 6)
        loss = nn.functional.mse_loss(net(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        started = [(p.grad, dist.all_reduce(p.grad, async_op=True)) for p in net.parameters()]
        for parameter, (gradient, work) in zip(net.parameters(), under_way or started, strict=True):
            work.wait()
            parameter.grad = gradient / dist.get_world_size()
        under_way = started
        optimizer.step()  # raises: DC108
    print(f"rank {dist.get_rank()} loss {loss.item():.5f}", flush=True)
    del under_way, started


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
