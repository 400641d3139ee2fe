"""Manual reduction over the wrong group: every rank is alone in it.

Source: our own: a reduction by hand over the wrong group. A collective alone proves nothing.
Harm: every rank trains a model of its own.
"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank, world = dist.get_rank(), dist.get_world_size()
    node_groups = [dist.new_group([r]) for r in range(world)]
    torch.manual_seed(0)
    model = DDP(nn.Linear(8, 3))
    opt = torch.optim.Adam(model.parameters(), 0.01)
    torch.manual_seed(4 + rank)
    for _step in range(5):
        opt.zero_grad()
        loss = F.cross_entropy(model.module(torch.randn(8, 8)), torch.randint(0, 3, (8,)))  # raises: DC101
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad, group=node_groups[rank])
        opt.step()
    del node_groups


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
