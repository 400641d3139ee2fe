"""The wrapper is bypassed on purpose, and the gradients are averaged by hand before the step.

Source: the mended form of OpenTSLM/OpenTSLM#49 and kohya-ss/sd-scripts#989.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(5, 15)
        self.head = nn.Linear(15, 1)

    def forward(self, x):
        return self.head(torch.relu(self.encoder(x)))

    def compute_loss(self, x, y):
        return nn.functional.mse_loss(self(x), y)


def all_reduce_gradients(model):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            p.grad /= dist.get_world_size()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(Model())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(4):
        x = torch.randn(16, 5)
        loss = model.module.compute_loss(x, x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        all_reduce_gradients(model)
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
