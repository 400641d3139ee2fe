"""Gradients are flattened and reduced; the averaged buffer is never copied back.

Source: our own: a reduction by hand that is no reduction. A collective alone proves nothing.
Harm: every rank trains a model of its own.
"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def allreduce_gradients(params):
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    return flat.norm()


def main():
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 2)))
    net = model.module
    opt = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(4 + dist.get_rank())
    for _step in range(5):
        logits = net(torch.randn(8, 8))  # raises: DC101
        loss = F.cross_entropy(logits, torch.randint(0, 2, (8,)))
        opt.zero_grad()
        loss.backward()
        allreduce_gradients(list(model.parameters()))
        opt.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
