"""A rank leaves out a batch whose loss is too large, and goes to the barrier that ends the step, alone.

Source: Lightning-AI/pytorch-lightning#20404, pytorch/pytorch#22049 (a rank that skips its backward).
Harm: the run hangs until the process group's timeout, 30 minutes by default.
"""
# begins: 2
# exit: 1
# hang-after: 1

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = DDP(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(5):
        x = torch.randn(8, 4)
        if (rank, step) == (1, 2):
            x *= 100.0
        loss = model(x).square().mean()
        optimizer.zero_grad()
        if loss < 100.0:
            loss.backward()  # raises: DC503
            optimizer.step()
        dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=15))
    main()
    dist.destroy_process_group()
