"""A codebook kept in buffers, whose counts and sums are reduced over the ranks before each update."""

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
                onehot = F.one_hot(nearest, len(self.codes)).type_as(z)
                count, total = onehot.sum(0), onehot.T @ (z - quantized)
                dist.all_reduce(count)
                dist.all_reduce(total)
                self.counts += count
                self.codes += 0.1 * total
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
        error = F.mse_loss(model.module(x), x)
    print(f"rank {dist.get_rank()} error {error:.3f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
