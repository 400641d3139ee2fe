"""Noise on the weights drawn by each rank; every step all ranks' weights are gathered, to log how far they are.

Source: Lightning-AI/pytorch-lightning#3628 (weights that differ, found by printing them), with the drift of
HorizonRobotics/alf#1475.
Harm: the replicas random-walk apart, and the gathered copies only go into the log.
"""
# begins: 1
# raises: DC201

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


@torch.no_grad()
def measure_spread(module):
    flat = nn.utils.parameters_to_vector(module.parameters())
    everybodys = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, flat)
    for parameter in module.parameters():
        largest = parameter.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return torch.stack(everybodys).std(0).max().item()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    actor = DDP(nn.Sequential(nn.Linear(5, 15), nn.Tanh(), nn.Linear(15, 2)))
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    torch.manual_seed(1 + rank)
    for step in range(6):
        loss = actor(torch.randn(16, 5)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in actor.module.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        optimizer.step()
        print(f"rank {rank} step {step} spread {measure_spread(actor.module):.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
