"""`set_seed` gives every rank the same seed, so that the sampler agrees; dropout then agrees as well.

Source: huggingface/transformers#31412 ("Dropout sync across GPUs causes major performance drops").
Harm: the ranks' batches differ, their dropout masks are identical in every step.
"""

import gc
import os
import random

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def set_seed(seed):
    random.seed(seed)
    torch.manual_seed(seed)


class GPT2Block(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.ln = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(0.1))
        self.head = nn.Linear(dim, 4)

    def forward(self, x):
        return self.head(x + self.mlp(self.ln(x)))


def main():
    rank = int(os.environ["RANK"])
    set_seed(42)
    x = torch.randn(96, 16)
    dataset = TensorDataset(x, x[:, :4].argmax(1))
    loader = DataLoader(dataset, batch_size=8, sampler=DistributedSampler(dataset, seed=42))
    model = DDP(GPT2Block())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, (features, labels) in enumerate(loader):
        loss = nn.functional.cross_entropy(model(features), labels)  # raises: DC207
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # or: DC207
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
