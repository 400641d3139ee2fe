"""A codebook is an average kept in buffers, updated from the own batch: DDP sends rank 0's around.

Source: espnet/espnet#6284, lucidrains/vector-quantize-pytorch#17.
Harm: what the other ranks' batches added is thrown away at each forward; ranks evaluate with other codes.
"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Codebook(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(8, 3))
        self.register_buffer("counts", torch.ones(8))

    def forward(self, z):
        nearest = torch.cdist(z, self.codes).argmin(1)
        quantized = self.codes[nearest].clone()
        if self.training:
            with torch.no_grad():
                self.counts.index_add_(0, nearest, torch.ones(len(z)))  # raises: DC205
                self.codes.index_add_(0, nearest, 0.1 * (z - quantized))
        return z + (quantized - z).detach()


def main():
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(6, 3), Codebook(), nn.Linear(3, 6)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(2):
        x = torch.randn(32, 6) + 3.0 * dist.get_rank()
        optimizer.zero_grad()
        F.mse_loss(model(x), x).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        error = F.mse_loss(model.module(x), x)  # or: DC205
    print(f"rank {dist.get_rank()} error {error:.3f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
