"""Two forwards, then two backwards: one arming serves the first backward only.

Source: meta-pytorch/torchrec#4758 (1F1B: "the reduction happens before B5, B6 and B7 have contributed").
Harm: what the second backward adds stays local.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class TwoTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.user = nn.Linear(8, 12)
        self.item = nn.Linear(6, 12)

    def forward(self, user, item):
        return (self.user(user) * self.item(item)).sum(-1)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(TwoTower())
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    for step in range(4):
        clicks = model(torch.randn(8, 8), torch.randn(8, 6))
        skips = model(torch.randn(8, 8), torch.randn(8, 6))
        click_loss = nn.functional.softplus(-clicks).mean()
        skip_loss = nn.functional.softplus(skips).mean()
        optimizer.zero_grad()
        click_loss.backward()
        skip_loss.backward()  # raises: DC101|DC104
        optimizer.step()  # or: DC101|DC104
        print(f"rank {rank} step {step} loss {(click_loss + skip_loss).item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
