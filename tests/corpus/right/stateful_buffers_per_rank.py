"""A recurrent model carries its hidden state in a non-persistent buffer, each rank its own stream."""

import gc
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRUCell(4, 8), nn.Linear(8, 4)
        self.register_buffer("state", torch.zeros(2, 8), persistent=False)

    def forward(self, x):
        h = self.cell(x, self.state)
        self.state = h.detach()
        return self.out(h)


def main():
    torch.manual_seed(0)
    model = DDP(Stateful(), broadcast_buffers=False)
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    torch.manual_seed(4 + dist.get_rank())
    for _step in range(6):
        x = torch.randn(2, 4)
        loss = F.mse_loss(model(x), x.roll(1, -1))
        opt.zero_grad()
        loss.backward()
        opt.step()
    if dist.get_rank() == 0:
        torch.save(model.module.state_dict(), os.devnull)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
