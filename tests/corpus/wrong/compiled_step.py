"""The whole loss function is compiled; inside, it unwraps.

Source: pytorch/pytorch#60921, inside a compiled loss function.
Harm: every rank trains a model of its own.
"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def unwrap(model):
    return model.module if isinstance(model, DDP) else model


def loss_fn(model, x, y):
    logits = unwrap(model)(x)  # raises: DC101
    return F.cross_entropy(logits, y)


def main():
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    compiled_loss = torch.compile(loss_fn, backend="eager")
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(4):
        loss = compiled_loss(model, torch.randn(8, 8), torch.randint(0, 4, (8,)))  # or: DC101
        opt.zero_grad()
        loss.backward()  # or: DC101
        opt.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
