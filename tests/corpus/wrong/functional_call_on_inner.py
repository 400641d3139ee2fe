"""Weight noise through `torch.func.functional_call` on the inner module.

Source: pytorch/pytorch#60921 (backward after calling `ddp.module` is unsupported by design), in its functional
form.
Harm: the perturbed weights are functions of the real parameters, whose gradients arrive unreduced.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel as DDP


def perturbed(module, sigma):
    return {name: p + sigma * torch.randn_like(p) for name, p in module.named_parameters()}


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    ddp = DDP(nn.Sequential(nn.Linear(8, 32), nn.ELU(), nn.Linear(32, 2)))
    optimizer = torch.optim.Adam(ddp.parameters(), lr=1e-2)
    for step in range(4):
        x = torch.randn(16, 8)
        target = (x[:, 0] > x[:, 1]).long()
        logits = functional_call(ddp.module, perturbed(ddp.module, 0.01), (x,))  # raises: DC101
        loss = nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
