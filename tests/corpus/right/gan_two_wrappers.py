"""A GAN: two wrapped networks, two optimizers, the discriminator called three times a step."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import softplus
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    generator = DDP(nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 6)))
    discriminator = DDP(nn.Sequential(nn.Linear(6, 24), nn.LeakyReLU(0.2), nn.Linear(24, 1)))
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for step in range(4):
        real = torch.randn(16, 6) + 2
        fake = generator(torch.randn(16, 4))

        logits = discriminator(torch.cat([real, fake.detach()]))
        d_loss = softplus(-logits[:16]).mean() + softplus(logits[16:]).mean()
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()

        discriminator.requires_grad_(False)
        g_loss = softplus(-discriminator(fake)).mean()
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
        discriminator.requires_grad_(True)
        print(f"rank {rank} step {step} d {d_loss.item():.4f} g {g_loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
