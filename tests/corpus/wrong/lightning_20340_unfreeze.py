"""Gradual unfreezing: the backbone's parameters are made trainable after the model was wrapped.

Source: Lightning-AI/pytorch-lightning#20340 (BackboneFinetuning under DDP), facebookresearch/detectron2#2486.
Harm: the reducer was built from the parameters that required gradients then; the backbone trains unreduced.
"""
# begins: 2

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class FineTuned(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.backbone(x)))


def unfreeze(module, optimizer, lr):
    for param in module.parameters():
        param.requires_grad = True  # raises: DC102
    optimizer.add_param_group({"params": list(module.parameters()), "lr": lr})  # or: DC102


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(1)
    net = FineTuned()
    net.backbone.requires_grad_(False)
    model = DDP(net)
    optimizer = torch.optim.Adam(net.head.parameters(), lr=1e-2)
    torch.manual_seed(30 + rank)
    for epoch in range(3):
        if epoch == 1:
            unfreeze(model.module.backbone, optimizer, lr=1e-3)  # or: DC102
        for _ in range(2):
            x = torch.randn(16, 12)
            loss = nn.functional.cross_entropy(model(x), (x[:, :4]).argmax(1))
            optimizer.zero_grad()
            loss.backward()  # or: DC102
            optimizer.step()  # or: DC102
        print(f"rank {rank} epoch {epoch} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
