"""StyleGAN-like: the lazy R1 penalty has a backward of its own, and its logits come from the inner module.

Source: NVlabs/stylegan2-ada-pytorch#118 (second derivatives under DDP).
Harm: every third step adds a rank-local gradient.
"""

# begins: 2
import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    torch.manual_seed(0)
    D = DDP(nn.Sequential(nn.Linear(4, 16), nn.Softplus(), nn.Linear(16, 1)))
    opt = torch.optim.Adam(D.parameters(), 1e-3)
    torch.manual_seed(4 + dist.get_rank())
    for step in range(7):
        real, fake = torch.randn(8, 4), torch.randn(8, 4) + 1
        opt.zero_grad()
        loss = F.softplus(D(fake)).mean() + F.softplus(-D(real)).mean()
        loss.backward()
        if step % 3 == 2:
            real = real.requires_grad_(True)
            logits = D.module(real)  # raises: DC101
            (grad,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
            (3 * grad.square().sum(1).mean()).backward()
        opt.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
