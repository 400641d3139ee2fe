"""A VAE whose two halves are methods: `encode` and `decode` are called on the module under the wrapper.

Source: pytorch/pytorch#14616 (methods f1 and f2 of a wrapped model; only forward is wrapped).
Harm: neither half's gradients are reduced.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class VAE(nn.Module):
    def __init__(self, data=12, latent=3):
        super().__init__()
        self.to_stats = nn.Linear(data, 2 * latent)
        self.to_data = nn.Linear(latent, data)

    def encode(self, x):
        mean, logvar = self.to_stats(x).chunk(2, dim=-1)
        return mean, logvar

    def decode(self, z):
        return self.to_data(z)

    def forward(self, x):
        return self.decode(self.encode(x)[0])


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    vae = DDP(VAE())
    optimizer = torch.optim.SGD(vae.parameters(), lr=0.05, momentum=0.9)
    data = torch.randn(64, 12) * (1 + rank)
    for step in range(6):
        x = data[(step * 8) % 64 :][:8]
        mean, logvar = vae.module.encode(x)  # raises: DC101
        z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        reconstruction = vae.module.decode(z)  # or: DC101
        kl = -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean()
        loss = nn.functional.mse_loss(reconstruction, x) + 0.01 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} elbo {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
