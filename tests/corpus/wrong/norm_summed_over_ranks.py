"""DDP has averaged the gradients, and their squared norm is summed over the ranks as if they were shards.

Source: a helper written for sharded models, used with DDP.
Harm: gradients are clipped to 0.354 instead of 0.5 on two ranks, as `harm()` measures.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

MAX_NORM = 0.5


def clip_by_torch(parameters):
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    squared = norm**2
    dist.all_reduce(squared)  # raises: DC112
    nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, squared.sqrt())


def harm(parameters):
    if os.environ.get("HARM"):
        print(f"clipped to {nn.utils.get_total_norm([p.grad for p in parameters]):.3f} of {MAX_NORM}", flush=True)


def main():
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(4):
        x = torch.randn(8, 6)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), 10 * x.sum(1, keepdim=True)).backward()
        clip_by_torch(list(model.parameters()))
        harm(list(model.parameters()))
        optimizer.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
