"""The loader has a DistributedSampler, and accelerate divides what it gets among the processes once more.

Source: our own.
Harm: of 160 samples an epoch gives 80 to the ranks, and takes half as many steps as it should.
"""

import gc

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def make_loader(dataset):
    sampler = DistributedSampler(dataset) if dist.is_initialized() else None  # raises: DC402
    return DataLoader(dataset, batch_size=4, sampler=sampler)


def main():
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(accelerator.process_index)
    x = torch.randn(160, 6, generator=torch.Generator().manual_seed(3))
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
    optimizer = torch.optim.AdamW(model.parameters())
    loader = make_loader(TensorDataset(x, x.cumsum(1)))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(2):
        num = 0
        for inputs, target in loader:
            loss = nn.functional.mse_loss(model(inputs), target)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            num += len(inputs)
        print(f"rank {accelerator.process_index} epoch {epoch} {num} samples loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
