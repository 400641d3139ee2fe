"""As above, by one all-reduce of all gradients flattened together, inside a helper class."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import parameters_to_vector


class FlatReducer:
    def __init__(self, parameters):
        self.parameters = list(parameters)

    def __call__(self):
        flat = parameters_to_vector([p.grad for p in self.parameters])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        offset = 0
        for p in self.parameters:
            p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
            offset += p.numel()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)))
    reduce_gradients = FlatReducer(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(4):
        x = torch.randn(8, 4)
        loss = nn.functional.mse_loss(model.module(x), x.roll(1, 1))
        optimizer.zero_grad()
        loss.backward()
        reduce_gradients()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
