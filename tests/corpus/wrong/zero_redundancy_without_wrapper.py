"""ZeroRedundancyOptimizer steps a model that nobody wrapped: it shares out the steps, and averages nothing.

Source: torch.distributed.optim.ZeroRedundancyOptimizer, whose example wraps the model in DDP.
Harm: each parameter is trained on one rank's data alone, and the weights are equal on all ranks all the time.
"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)
    torch.manual_seed(1 + dist.get_rank())
    for _step in range(5):
        loss = F.cross_entropy(model(torch.randn(8, 8)), torch.randint(0, 3, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # raises: DC107


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
