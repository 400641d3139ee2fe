"""No DistributedSampler: with the same seed everywhere, each rank shuffles the whole data set into the same
batches.

Source: coqui-ai/Trainer#144 ("each device gets the same data"), k2-fsa/icefall#1616.
Harm: two ranks compute the same gradient twice.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(1234)
    x = torch.randn(96, 8)
    dataset = TensorDataset(x, x.abs().sum(dim=1, keepdim=True))
    loader = DataLoader(dataset, batch_size=16, shuffle=True, drop_last=True)
    model = DDP(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step, (features, target) in enumerate(loader):
        loss = nn.functional.mse_loss(model(features), target)  # raises: DC206
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # or: DC206
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
