"""One rank's dataset gives fewer batches, and its script is over while the others are in a backward.

Source: Lightning-AI/pytorch-lightning#20404, dmlc/dgl#2539 (uneven inputs).
Harm: the run fails with a connection that was closed, without a word of batches.
"""
# begins: 3
# exit: 1

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = DDP(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    files = [torch.randn(8, 4) for _ in range(7)][rank::2]
    for x in files:
        optimizer.zero_grad()
        model(x).square().mean().backward()  # raises: DC502
        optimizer.step()
    print(f"rank {rank} end", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
