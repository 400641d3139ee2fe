"""An fx graph of the inner module is trained: it shares the parameters, not the wrapper.

Source: pytorch/pytorch#60921, through a module that shares the parameters.
Harm: every rank trains a model of its own.
"""

import gc

import torch
import torch.distributed as dist
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    torch.manual_seed(0)
    ddp = DDP(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2)))
    graph = torch.fx.symbolic_trace(ddp.module)
    opt = torch.optim.SGD(ddp.parameters(), 0.1)
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(4):
        loss = F.cross_entropy(graph(torch.randn(8, 6)), torch.randint(0, 2, (8,)))  # raises: DC101
        opt.zero_grad()
        loss.backward()  # or: DC101
        opt.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
