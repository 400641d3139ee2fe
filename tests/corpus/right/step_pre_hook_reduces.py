"""A step pre-hook on the optimizer averages the gradients."""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def average(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for p in group["params"]:
            dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            p.grad.div_(dist.get_world_size())


def main():
    torch.manual_seed(0)
    ddp = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    opt = torch.optim.Adam(ddp.parameters(), 0.01)
    opt.register_step_pre_hook(average)
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(4):
        loss = F.cross_entropy(ddp.module(torch.randn(8, 8)), torch.randint(0, 3, (8,)))
        loss.backward()
        opt.step()
        opt.zero_grad()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
