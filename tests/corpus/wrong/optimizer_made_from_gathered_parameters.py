"""A dry run between fully_shard and the optimizer leaves parameters gathered, and the optimizer takes those.

Source: the class of pytorch/pytorch#149205.
Harm: no step changes the model.
"""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard


def main():
    torch.manual_seed(3)
    net = fully_shard(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 1)))
    width = net(torch.zeros(1, 6)).shape[1]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)  # raises: DC109
    torch.manual_seed(10 + dist.get_rank())
    for _ in range(5):
        x = torch.randn(16, 6)
        loss = nn.functional.mse_loss(net(x), x.sum(1, keepdim=True).expand(-1, width))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"rank {dist.get_rank()} loss {loss.item():.5f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
