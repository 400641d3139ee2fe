"""A calibration loop calls `model.forward` on a sharded model.

Source: NVIDIA/Model-Optimizer#1563 (calibration under FSDP2).
Harm: crash, "got mixed torch.Tensor and DTensor", in the first batch.
"""
# exit: 1

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 32)
        self.fc2 = nn.Linear(32, 4)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


@torch.no_grad()
def calibrate(model, batches):
    ranges = []
    for batch in batches:
        out = model.forward(batch)  # raises: DC306
        ranges.append((out.min().item(), out.max().item()))
    return ranges


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = fully_shard(Classifier())
    print(f"rank {rank} {calibrate(model, [torch.randn(4, 8) for _ in range(3)])}", flush=True)  # or: DC306


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
