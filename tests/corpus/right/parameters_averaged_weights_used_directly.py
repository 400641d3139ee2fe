"""Weights used without any module's forward, and averaged after every step: local gradients are meant.

The averaging shows while the line that uses the weights is looked for still.
"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    torch.manual_seed(0)
    model = DDP(nn.Linear(5, 3))
    opt = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(4 + dist.get_rank())
    for step in range(4):
        loss = F.linear(torch.randn(8, 5), model.module.weight, model.module.bias).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        for parameter in model.parameters():
            dist.all_reduce(parameter.data)
            parameter.data /= dist.get_world_size()
        print(f"rank {dist.get_rank()} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
