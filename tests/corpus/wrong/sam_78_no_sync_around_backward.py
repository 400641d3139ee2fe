"""Sharpness-aware minimisation: the first backward is put under `no_sync()`, its forward is not.

Source: davda54/sam#78 (the README's tip for several GPUs "may be invalid": the forward belongs into the
context).
Harm: none to the gradients; `no_sync()` has no effect, so the ascent step uses the global gradient where the
rank's own was meant, and pays for a reduction. A warning, not an error.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class SAM:
    def __init__(self, params, rho=0.05, **options):
        self.params = list(params)
        self.base = torch.optim.SGD(self.params, **options)
        self.rho = rho
        self.saved = []

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm() for p in self.params]).norm()
        self.saved = [p.clone() for p in self.params]
        for p in self.params:
            p.add_(p.grad, alpha=self.rho / (norm + 1e-12))
        self.base.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p, saved in zip(self.params, self.saved, strict=True):
            p.copy_(saved)
        self.base.step()
        self.base.zero_grad()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)))
    optimizer = SAM(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        x = torch.randn(16, 8)
        y = x[:, :4].argmax(dim=1)
        loss = nn.functional.cross_entropy(model(x), y)
        with model.no_sync():  # raises: DC104
            loss.backward()  # or: DC104
        optimizer.first_step()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.second_step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
