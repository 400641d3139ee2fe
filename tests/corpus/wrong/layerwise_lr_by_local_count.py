"""The learning rate is scaled by the number of samples the rank happens to hold.

Source: huggingface/accelerate#3797 and its kind (learning rates computed in each process); a per-rank learning
rate is in no sampler's contract, and no collective notices it.
Harm: reduced gradients, different steps: the replicas drift.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset


def build_optimizer(model, dataset, base_lr=1e-2, reference_size=64):
    scaled = base_lr * len(dataset) / reference_size
    return torch.optim.AdamW(model.parameters(), lr=scaled)  # raises: DC203


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    samples = 64 if rank == 0 else 48
    x = torch.randn(samples, 6)
    shard = TensorDataset(x, x.prod(dim=1, keepdim=True))
    model = DDP(nn.Sequential(nn.Linear(6, 24), nn.SiLU(), nn.Linear(24, 1)))
    optimizer = build_optimizer(model, shard)  # or: DC203
    loader = iter(DataLoader(shard, batch_size=8, shuffle=True))
    for step in range(5):
        features, target = next(loader)
        loss = nn.functional.mse_loss(model(features), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # or: DC203
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
