"""Reptile: inner steps on a copy, the meta-gradient is written and all-reduced by hand."""

import copy
import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)))
    meta = torch.optim.SGD(model.parameters(), 0.5)
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(3):
        fast = copy.deepcopy(model.module)
        inner = torch.optim.SGD(fast.parameters(), 0.05)
        a = torch.rand(1) + 0.5
        for _step in range(3):
            x = torch.randn(8, 1)
            loss = F.mse_loss(fast(x), a * x.sin())
            inner.zero_grad()
            loss.backward()
            inner.step()
        for p, q in zip(model.module.parameters(), fast.parameters(), strict=False):
            p.grad = p.data - q.data
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        meta.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
