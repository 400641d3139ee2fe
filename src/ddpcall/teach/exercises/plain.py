"""What all exercises share: a small model, its data, a right training loop, and how a rank starts.

An exercise is what it changes here. Handed out is one script, put together by `ddpcall.teach.exercises`.
"""

import gc
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset  # noqa: F401 (exercises use them all)

EPOCHS, BATCH_SIZE = 3, 32


class Net(nn.Module):
    def __init__(self, features=8, classes=4, width=32):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, width), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.encoder(x))


def make_data(split, samples=768):
    generator = torch.Generator().manual_seed({"train": 1, "test": 2}[split])
    centers = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 1.5
    labels = torch.randint(0, 4, (samples,), generator=generator)
    return TensorDataset(centers[labels] + torch.randn(samples, 8, generator=generator), labels)


def make_model():
    torch.manual_seed(0)
    return Net()


def main(device):
    rank = dist.get_rank()
    data = make_data("train")
    sampler = DistributedSampler(data, seed=0)
    loader = DataLoader(data, BATCH_SIZE, sampler=sampler)

    model = DDP(make_model().to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for x, y in loader:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"rank {rank} epoch {epoch} loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    use_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("nccl" if use_gpu else "gloo")
    main(torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else torch.device("cpu"))
    gc.collect()
    dist.destroy_process_group()
