"""A batch sampler passes `set_epoch` on, workers draw ahead and persist, and an endless iterator goes round."""

import gc
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset


class EpochBatches(BatchSampler):
    def set_epoch(self, epoch):
        self.sampler.set_epoch(epoch)


def endless(loader):
    epoch = 0
    while True:
        loader.batch_sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def main():
    torch.manual_seed(3)
    x = torch.randn(64, 6)
    dataset = TensorDataset(x, x.cumsum(1))
    batches = EpochBatches(DistributedSampler(dataset), batch_size=8, drop_last=True)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=2, persistent_workers=True)
    model = DDP(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)))
    optimizer = torch.optim.Adam(model.parameters())
    for x, y in islice(endless(loader), 10):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"rank {dist.get_rank()} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
