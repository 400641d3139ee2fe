"""One module under two wrappers with different options, used in turn: whichever is called reduces the gradients.

Source: a pattern of multi-task trainers, which wrap the whole model once for each task's graph.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    wrappers = [DDP(net), DDP(net, find_unused_parameters=True)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(1 + rank)
    for step in range(6):
        x = torch.randn(16, 8)
        loss = nn.functional.mse_loss(wrappers[step % 2](x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
