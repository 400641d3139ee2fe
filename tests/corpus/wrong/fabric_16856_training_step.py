"""A module in the Lightning style: `training_step` is not forward, so the trainer reaches for the inner
object.

Source: Lightning-AI/pytorch-lightning#16856 (training_step on a wrapped module bypasses DDP; led to Fabric's
warning).
Harm: gradients stay local.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": self.criterion(self(x), y), "batch_idx": batch_idx}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(model, loader, max_steps):
    rank = dist.get_rank()
    wrapped = DDP(model)
    optimizer = wrapped.module.configure_optimizers()
    for batch_idx, batch in enumerate(loader):
        if batch_idx == max_steps:
            break
        optimizer.zero_grad()
        output = wrapped.module.training_step(batch, batch_idx)  # raises: DC101
        output["loss"].backward()
        optimizer.step()
        print(f"rank {rank} step {batch_idx} loss {output['loss'].item():.4f}", flush=True)


def main():
    torch.manual_seed(0)
    x = torch.randn(80, 10)
    dataset = TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
    torch.manual_seed(1 + int(os.environ["RANK"]))
    fit(Classifier(), DataLoader(dataset, batch_size=8, sampler=DistributedSampler(dataset)), max_steps=5)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
