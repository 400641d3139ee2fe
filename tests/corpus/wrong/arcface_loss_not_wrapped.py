"""Metric learning: the margin loss owns class centres, is outside the wrapper, and has its own optimizer.

Source: pytorch/pytorch#12603's mechanism (parameters no reducer owns), in the shape of a margin loss.
Harm: the class centres drift apart; the backbone's gradients are then averaged over different losses.
"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class ArcFace(nn.Module):
    def __init__(self, dim, classes, s=16.0, m=0.2):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, dim) * 0.1)
        self.s, self.m = s, m

    def forward(self, features, labels):
        cosine = F.linear(F.normalize(features), F.normalize(self.weight))
        margin = F.one_hot(labels, cosine.shape[1]) * self.m
        return F.cross_entropy(self.s * (cosine - margin), labels)


def main():
    torch.manual_seed(0)
    backbone = DDP(nn.Sequential(nn.Linear(12, 32), nn.PReLU(), nn.Linear(32, 8)))
    criterion = ArcFace(8, 5)
    opt = torch.optim.SGD(backbone.parameters(), 0.05)
    opt_centres = torch.optim.SGD(criterion.parameters(), 0.5)  # or: DC102
    torch.manual_seed(3 + dist.get_rank())
    for _ in range(5):
        features = backbone(torch.randn(16, 12))
        loss = criterion(features, torch.randint(0, 5, (16,)))  # raises: DC102
        opt.zero_grad()
        opt_centres.zero_grad()
        loss.backward()  # or: DC102
        opt.step()
        opt_centres.step()  # or: DC102


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
