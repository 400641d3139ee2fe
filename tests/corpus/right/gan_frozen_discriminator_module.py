"""The generator step goes through the inner, frozen discriminator: no gradient is lost."""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    torch.manual_seed(0)
    G = DDP(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)))
    D = DDP(nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1)))
    og, od = (torch.optim.Adam(m.parameters(), 1e-3) for m in (G, D))
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(3):
        with torch.no_grad():
            fake = G.module(torch.randn(8, 4))
        out = D(torch.cat([torch.randn(8, 2), fake]))
        loss = F.softplus(-out[:8]).mean() + F.softplus(out[8:]).mean()
        od.zero_grad()
        loss.backward()
        od.step()
        for p in D.parameters():
            p.requires_grad_(False)
        loss = F.softplus(-D.module(G(torch.randn(8, 4)))).mean()
        og.zero_grad()
        loss.backward()
        og.step()
        for p in D.parameters():
            p.requires_grad_(True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
