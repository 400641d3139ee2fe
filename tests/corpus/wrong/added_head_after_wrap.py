"""Class-incremental learning: a larger head is put in place of the old one after the model was wrapped.

Source: pytorch/pytorch#12603 and the warning in DDP's docs ("never try to change your model's parameters after
wrapping"), as quoted in huggingface/transformers#416.
Harm: rank-local initial values and rank-local gradients in the new head.
"""
# begins: 2

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class IncrementalNet(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(10, 20), nn.ReLU())
        self.fc = nn.Linear(20, classes)

    def update_fc(self, classes):
        fc = nn.Linear(20, classes)
        fc.weight.data[: self.fc.out_features] = self.fc.weight.data
        fc.bias.data[: self.fc.out_features] = self.fc.bias.data
        self.fc = fc  # raises: DC102

    def forward(self, x):
        return self.fc(self.features(x))


def run_task(model, optimizer, classes, rank, steps=2):
    for step in range(steps):
        x, y = torch.randn(16, 10), torch.randint(0, classes, (16,))
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # or: DC102
        optimizer.step()  # or: DC102
        print(f"rank {rank} classes {classes} step {step} loss {loss.item():.4f}", flush=True)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(60 + rank)
    model = DDP(IncrementalNet(5), find_unused_parameters=True)
    run_task(model, torch.optim.SGD(model.parameters(), lr=0.05), 5, rank)
    model.module.update_fc(8)  # or: DC102
    run_task(model, torch.optim.SGD(model.parameters(), lr=0.05), 8, rank, steps=3)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
