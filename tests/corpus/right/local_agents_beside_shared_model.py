"""Per-rank parameters on purpose: each rank has its own embedding, started apart, beside a shared model."""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    torch.manual_seed(4 + rank)
    subject = nn.Parameter(torch.randn(8) * 0.1)
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    opt_subject = torch.optim.Adam([subject], 1e-1)
    for _step in range(5):
        loss = F.cross_entropy(model(torch.randn(8, 8) + subject), torch.randint(0, 3, (8,)))
        opt.zero_grad()
        opt_subject.zero_grad()
        loss.backward()
        opt.step()
        opt_subject.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
