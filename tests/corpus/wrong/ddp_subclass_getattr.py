"""A DDP subclass that forwards unknown attributes to its module.

Source: Lightning-AI/pytorch-lightning#16856's mechanism, in a subclass of DDP.
Harm: every rank trains a model of its own.
"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Parallel(DDP):
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


class Diffusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 32), nn.SiLU(), nn.Linear(32, 4))

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None]], 1))

    def p_losses(self, x):
        t, noise = torch.rand(len(x)), torch.randn_like(x)
        noisy = x * (1 - t)[:, None] + noise * t[:, None]
        return F.mse_loss(self(noisy, t), noise)


def main():
    torch.manual_seed(0)
    diffusion = Parallel(Diffusion())
    opt = torch.optim.AdamW(diffusion.parameters(), 1e-3)
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(4):
        loss = diffusion.p_losses(torch.randn(8, 4))  # raises: DC101
        loss.backward()
        opt.step()
        opt.zero_grad()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
