"""Two wrappers around models that share a trunk, trained in turn, each through its own wrapper."""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Task(nn.Module):
    def __init__(self, trunk, out):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(16, out)

    def forward(self, x):
        return self.head(self.trunk(x))


def main():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
    tasks = [DDP(Task(trunk, n)) for n in (2, 5)]
    opt = torch.optim.Adam({p for t in tasks for p in t.parameters()}, 1e-2)
    torch.manual_seed(4 + dist.get_rank())
    for step in range(6):
        task = tasks[step % 2]
        out = task(torch.randn(8, 8))
        opt.zero_grad()
        F.cross_entropy(out, torch.randint(0, out.shape[1], (8,))).backward()
        opt.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
