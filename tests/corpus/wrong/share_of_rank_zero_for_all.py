"""The configuration names one rank and one number of replicas for all: every rank trains on the same share.

Source: our own.
Harm: every batch is one that the other rank has too, and half of the samples are never seen.
"""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

CONFIG = {"num_replicas": 2, "rank": 0, "batch_size": 8}


class Data:
    def __init__(self, config):
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(3))
        self.dataset = TensorDataset(x, x.cumsum(1))
        self.config = config

    def train_loader(self):
        self.sampler = DistributedSampler(  # raises: DC402
            self.dataset, num_replicas=self.config["num_replicas"], rank=self.config["rank"]
        )
        return DataLoader(self.dataset, batch_size=self.config["batch_size"], sampler=self.sampler)


def main():
    torch.manual_seed(dist.get_rank())
    data = Data(CONFIG)
    loader = data.train_loader()
    model = DDP(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch in range(3):
        data.sampler.set_epoch(epoch)
        for inputs, target in loader:
            loss = nn.functional.mse_loss(model(inputs), target)  # raises: DC206
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"rank {dist.get_rank()} epoch {epoch} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
