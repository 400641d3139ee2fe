"""fully_shard with two micro-batches: the last one is reduced, together with the first."""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard


def main():
    torch.manual_seed(3)
    net = fully_shard(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 1)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    torch.manual_seed(10 + dist.get_rank())
    for _ in range(5):
        optimizer.zero_grad()
        for micro in range(2):
            net.set_requires_gradient_sync(micro == 1)
            x = torch.randn(16, 6)
            nn.functional.mse_loss(net(x), x.sum(1, keepdim=True)).backward()
        optimizer.step()
    print(f"rank {dist.get_rank()} done", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
