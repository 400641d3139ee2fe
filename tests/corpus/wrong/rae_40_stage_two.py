"""Stage one calls the wrapper, stage two switches to a method of the inner module.

Source: bytetriper/RAE#40 (a custom path bypasses DDP).
Harm: the first two steps are synchronised, the later ones are not.
"""
# begins: 2

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Autoencoder(nn.Module):
    def __init__(self, dim=16, latent=6):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(dim, 32), nn.SiLU(), nn.Linear(32, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 32), nn.SiLU(), nn.Linear(32, dim))

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def decode_noised(self, x, sigma):
        latent = self.encoder(x)
        return self.decoder(latent + sigma * torch.randn_like(latent))


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(Autoencoder())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    noise_from_step = 2
    for step in range(6):
        x = torch.randn(12, 16) + rank
        if step < noise_from_step:
            reconstruction = model(x)
        else:
            reconstruction = model.module.decode_noised(x, sigma=0.1)  # raises: DC101
        loss = nn.functional.mse_loss(reconstruction, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
