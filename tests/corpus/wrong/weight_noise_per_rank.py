"""Exploration noise is added to the weights in place, each rank drawing its own.

Source: HorizonRobotics/alf#1475's kind of drift (found there by their own checker), as parameter-space noise.
Harm: gradients are reduced; the replicas random-walk apart.
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
def add_noise(module, sigma):
    for p in module.parameters():
        p.add_(sigma * torch.randn_like(p))


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    actor = DDP(nn.Sequential(nn.Linear(5, 15), nn.Tanh(), nn.Linear(15, 2)))
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    for step in range(5):
        obs = torch.randn(16, 5)
        loss = actor(obs).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        add_noise(actor.module, sigma=0.01)
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
