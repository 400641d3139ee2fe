"""WGAN-GP: `autograd.grad` for the input's gradient inside the loss; the parameters' gradients come from
backward()."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    critic = DDP(nn.Sequential(nn.Linear(4, 32), nn.Softplus(), nn.Linear(32, 1)))
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    for step in range(4):
        real, fake = torch.randn(12, 4) + 1, torch.randn(12, 4)
        mixed = torch.lerp(real, fake, torch.rand(12, 1)).requires_grad_()
        scores = critic(torch.cat([real, fake, mixed]))
        (slope,) = torch.autograd.grad(scores[24:].sum(), mixed, create_graph=True)
        loss = scores[12:24].mean() - scores[:12].mean() + 10 * (slope.norm(dim=1) - 1).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
