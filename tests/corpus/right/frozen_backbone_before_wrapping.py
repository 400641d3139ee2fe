"""The backbone is frozen before wrapping and kept in eval mode on all ranks; only the head is trained."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.backbone(x).mean(dim=(2, 3)))

    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        return self


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    net = Detector()
    net.backbone.requires_grad_(False)
    model = DDP(net)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(4):
        x = torch.randn(6, 3, 9, 9)
        loss = nn.functional.cross_entropy(model(x), torch.randint(0, 4, (6,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
