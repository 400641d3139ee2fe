"""One seed for all ranks, and random numbers that may be the same: of a generator of one's own, sent by rank 0,
for weights, for an order; in a model without dropout."""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class NoisyWeights(nn.Linear):
    def forward(self, inputs):
        noise = 0.01 * torch.randn_like(self.weight)
        return nn.functional.linear(inputs, self.weight + noise, self.bias)


def main():
    rank = dist.get_rank()
    torch.manual_seed(7)
    own = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(192, 6, generator=torch.Generator().manual_seed(3))
    dataset = TensorDataset(x, x.cumsum(1))
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=8, sampler=sampler)
    model = DDP(nn.Sequential(NoisyWeights(6, 16), nn.Tanh(), NoisyWeights(16, 6)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for inputs, target in loader:
        shared = torch.rand(len(inputs), 6)
        dist.broadcast(shared, 0)
        order = torch.randperm(len(inputs))
        mixed = inputs + 0.1 * shared + 0.1 * torch.randn(inputs.shape, generator=own) + 0.1 * inputs[order]
        loss = nn.functional.mse_loss(model(mixed), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"rank {rank} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
