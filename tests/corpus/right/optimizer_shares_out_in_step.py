"""An optimizer that updates its rank's share and sends it in its own `step`; the shares are of unequal number.

Source: how Muon is distributed in trainers of small GPTs (each rank orthogonalises some of the matrices).
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class SharedOut(torch.optim.AdamW):
    """AdamW over every n-th parameter; `step` leaves all of them equal on all ranks."""

    def __init__(self, parameters, **settings):
        self.all = list(parameters)
        super().__init__(self.all[dist.get_rank() :: dist.get_world_size()], **settings)

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for index, parameter in enumerate(self.all):
                dist.broadcast(parameter, index % dist.get_world_size())
        return loss


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1, bias=False)))
    optimizer = SharedOut(model.parameters(), lr=1e-2)
    torch.manual_seed(1 + rank)
    for step in range(6):
        x = torch.randn(16, 8)
        loss = (model(x) - x[:, :1]).square().mean()
        model.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
