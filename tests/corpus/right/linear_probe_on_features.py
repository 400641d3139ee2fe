"""Features come from the inner backbone under no_grad; a probe with a wrapper of its own is trained on them."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    backbone = DDP(nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 8)))
    probe = DDP(nn.Linear(8, 3))
    backbone_optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-3)
    probe_optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
    for step in range(4):
        x = torch.randn(16, 10)
        contrast = (backbone(x) - backbone(x + 0.05 * torch.randn_like(x))).pow(2).mean()
        backbone_optimizer.zero_grad()
        contrast.backward()
        backbone_optimizer.step()
        with torch.no_grad():
            features = backbone.module(x)
        loss = nn.functional.cross_entropy(probe(features), x[:, :3].argmax(1))
        probe_optimizer.zero_grad()
        loss.backward()
        probe_optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
