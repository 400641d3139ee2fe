"""Adapters are put into a sharded model, and the script averages their gradients."""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard


class Adapter(nn.Module):
    """Adds a trained low-rank path beside a frozen layer."""

    def __init__(self, base, width, rank=2):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, width) * 0.3)
        self.up = nn.Parameter(torch.zeros(width, rank))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


class Net(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def main():
    torch.manual_seed(3)
    net = Net().requires_grad_(False)
    fully_shard(net.first)
    fully_shard(net.second)
    fully_shard(net)
    net.first, net.second = Adapter(net.first, 12), Adapter(net.second, 12)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    torch.manual_seed(10 + dist.get_rank())
    for _ in range(5):
        x = torch.randn(8, 12)
        loss = nn.functional.mse_loss(net(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        for p in trained:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        optimizer.step()
    print(f"rank {dist.get_rank()} adapters {sum(p.sum().item() for p in trained):.5f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
