"""A chain so deep that the gradients of its first layers fall below what float32 can hold; all are averaged."""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main():
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(*(nn.Linear(16, 16) for _ in range(180))))
    torch.manual_seed(dist.get_rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(18):
        loss = (model(torch.randn(8, 16)) - torch.randn(8, 16)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
