"""fully_shard gets the shard dimension of a mesh whose replicate dimension spans the ranks.

Source: our own, of the kind of hybrid sharding set up by hand.
Harm: each rank is alone in its group; nothing is averaged.
"""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main():
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(3)
    net = fully_shard(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 1)), mesh=mesh["shard"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    torch.manual_seed(10 + dist.get_rank())
    for _ in range(5):
        x = torch.randn(16, 6)
        loss = nn.functional.mse_loss(net(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # raises: DC106
    print(f"rank {dist.get_rank()} loss {loss.item():.5f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
