"""Optimizer states sharded by hand: each rank updates its share of the parameters, their owner broadcasts them.

Between the step and the broadcasts the replicas differ. Source: the first stage of ZeRO (arXiv 1910.02054).
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


@torch.no_grad()
def send_updates(parameters):
    for index, parameter in enumerate(parameters):
        dist.broadcast(parameter, index % dist.get_world_size())


def main():
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)))
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters[rank::world_size], lr=1e-2)
    torch.manual_seed(1 + rank)
    for step in range(8):
        x = torch.randn(16, 8)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        model.zero_grad()
        loss.backward()
        optimizer.step()
        send_updates(parameters)
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
