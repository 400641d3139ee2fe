"""Running statistics of observations, reduced over the ranks before each update; gradients averaged by hand."""

import gc

import torch
import torch.distributed as dist
from torch import nn


def agree(mean, variance):
    second = variance + mean**2
    dist.all_reduce(mean)
    dist.all_reduce(second)
    mean /= dist.get_world_size()
    return mean, second / dist.get_world_size() - mean**2


class Normalizer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                mean, variance = agree(x.mean(0), x.var(0))
                self.mean.lerp_(mean, 0.1)
                self.variance.lerp_(variance, 0.1)
        return (x - self.mean) / (self.variance + 1e-5).sqrt()


def main():
    rank = dist.get_rank()
    torch.manual_seed(0)
    policy = nn.Sequential(Normalizer(8), nn.Linear(8, 32), nn.ELU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    torch.manual_seed(10 + rank)
    for _ in range(10):
        observations = torch.randn(32, 8) * (1 + rank) + 2 * rank
        loss = -(policy(observations).tanh().sum(1) * torch.randn(32)).mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in policy.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()
    policy.eval()
    print(f"rank {rank} action {policy(torch.ones(4, 8)).sum().item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
