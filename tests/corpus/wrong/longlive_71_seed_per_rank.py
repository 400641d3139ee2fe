"""Every rank shuffles by a seed of its own, so that its share is one of another permutation.

Source: NVlabs/LongLive#71, mlcommons/training#625.
Harm: of 96 samples an epoch gives 71 to the ranks, 25 of them to both.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def build_loader(dataset, seed):
    sampler = DistributedSampler(dataset, shuffle=True, seed=seed)  # raises: DC402
    return DataLoader(dataset, batch_size=8, sampler=sampler, drop_last=True)


def main():
    rank = int(os.environ["RANK"])
    seed = 11 * rank
    torch.manual_seed(seed)
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(3))
    loader = build_loader(TensorDataset(torch.arange(96), x, x.cumsum(1)), seed)
    model = DDP(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)))
    optimizer = torch.optim.Adam(model.parameters())
    given = torch.zeros(96)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for index, inputs, target in loader:
            loss = nn.functional.mse_loss(model(inputs), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            given[index] += epoch == 0
    dist.all_reduce(given)
    print(f"rank {rank} seen {int((given > 0).sum())} twice {int((given > 1).sum())}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
