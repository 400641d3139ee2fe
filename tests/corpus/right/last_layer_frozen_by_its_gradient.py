"""The last layer's gradient is taken away in the first steps, as DINO does."""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main():
    torch.manual_seed(3)
    net = DistributedDataParallel(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 8)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    torch.manual_seed(10 + dist.get_rank())
    for step in range(8):
        loss = net(torch.randn(16, 6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step < 5:
            for p in net.module[2].parameters():
                p.grad = None
        optimizer.step()
    print(f"rank {dist.get_rank()} loss {loss.item():.5f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
