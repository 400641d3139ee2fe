"""Means over different numbers of rows: for adversarial inputs alone, and with padding that weighs zero."""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

PADDING = 0
REAL_ROWS = 6


def attack(net, x, y):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), y), x)
    return (x + 0.1 * gradient.sign()).detach()


def main():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    model = DDP(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = torch.ones(4)
    weight[PADDING] = 0
    torch.manual_seed(1 + dist.get_rank())
    for step in range(24):
        num_rows = 6 + 12 * ((step + dist.get_rank()) % 2)
        x, y = torch.randn(num_rows, 6), torch.randint(1, 4, (num_rows,))
        total = torch.tensor(float(num_rows))
        dist.all_reduce(total)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(attack(net, x, y)), y, reduction="sum")
        (loss * dist.get_world_size() / total).backward()
        optimizer.step()

        y[REAL_ROWS:] = PADDING
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, weight=weight).backward()
        optimizer.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
