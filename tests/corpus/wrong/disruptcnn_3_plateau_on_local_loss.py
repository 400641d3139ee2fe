"""`ReduceLROnPlateau` is stepped with the rank's own validation loss.

Source: rmchurch/disruptcnn#3 (the local total_loss, not the averaged one, decides about the plateau).
Harm: a rank whose loss stagnates lowers its learning rate alone; from then on equal gradients move replicas
apart.
"""
# begins: 3

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.lr_scheduler import ReduceLROnPlateau


@torch.no_grad()
def validate(model, shard_scale):
    x = shard_scale * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return nn.functional.mse_loss(model.module(x), x.sum(1, keepdim=True)).item()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=1)
    for epoch in range(6):
        shard_scale = 1 + 2 * epoch * rank  # rank 1's shard gets harder, rank 0's does not
        x = torch.randn(16, 4)
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # or: DC203
        scheduler.step(validate(model, shard_scale))  # raises: DC203
        lr = optimizer.param_groups[0]["lr"]
        print(f"rank {rank} epoch {epoch} loss {loss.item():.4f} lr {lr:g}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
