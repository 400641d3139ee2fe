"""A frozen layer is unfrozen for one look at its gradient and frozen again; zero_grad leaves zeros there.

Source: layer-wise sensitivity, as in pruning and in deciding which layers to fine-tune.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def measure_sensitivity(net, x, y):
    net[0].requires_grad_(True)
    nn.functional.cross_entropy(net(x), y).backward()
    norm = net[0].weight.grad.norm().item()
    net[0].requires_grad_(False)
    return norm


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].requires_grad_(False)
    model = DDP(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(1 + rank)
    for step in range(6):
        x = torch.randn(8, 8)
        y = (x[:, 0] > 0).long()
        if step == 2:
            print(f"rank {rank} sensitivity {measure_sensitivity(net, x, y):.4f}", flush=True)
        optimizer.zero_grad(set_to_none=False)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
