"""Horovod's way: the optimizer's own step averages the gradients; DDP stays in no_sync."""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class DistributedSGD(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= dist.get_world_size()
        return super().step(closure)


def main():
    torch.manual_seed(0)
    ddp = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    opt = DistributedSGD(ddp.parameters(), lr=0.1)
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(4):
        with ddp.no_sync():
            loss = F.cross_entropy(ddp(torch.randn(8, 8)), torch.randint(0, 3, (8,)))
            loss.backward()
        opt.step()
        opt.zero_grad()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
