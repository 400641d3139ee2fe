"""The normalisation layers are put into eval mode under `if rank == 0`, together with what was meant for rank 0.

Source: huggingface/lerobot#3668's mechanism (a mode set on the main rank only), by indentation.
Harm: rank 0 normalises with running statistics, rank 1 with its batch's; gradients are reduced all the same.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def prepare(net, rank):
    if rank == 0:
        print(f"{sum(p.numel() for p in net.parameters())} parameters", flush=True)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()  # raises: DC204
    return DDP(net)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = prepare(
        nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)), rank
    )  # or: DC204
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        x = torch.randn(16, 6)
        loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
