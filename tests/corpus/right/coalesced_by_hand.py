"""Local backward through the inner model, gradients reduced in one coalesced call."""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def average(params):
    dist.all_reduce_coalesced([p.grad for p in params])
    for p in params:
        p.grad /= dist.get_world_size()


def main():
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    opt = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(4):
        loss = F.cross_entropy(model.module(torch.randn(8, 8)), torch.randint(0, 3, (8,)))
        opt.zero_grad()
        loss.backward()
        average(list(model.parameters()))
        opt.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
