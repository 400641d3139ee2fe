"""BYOL: the online encoder is wrapped, the predictor is not; one optimizer trains both.

Source: pytorch/pytorch#12603's mechanism, in the shape of self-supervised training.
Harm: every rank has a predictor of its own.
"""

import copy
import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(10, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 8))
    target = copy.deepcopy(encoder).requires_grad_(False)
    predictor = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))  # or: DC102
    online = DDP(encoder)
    opt = torch.optim.SGD([*online.parameters(), *predictor.parameters()], 0.1)  # or: DC102
    torch.manual_seed(3 + dist.get_rank())
    for _ in range(5):
        x = torch.randn(16, 10)
        a, b = x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)
        p = predictor(online(a))  # raises: DC102
        with torch.no_grad():
            z = target(b)
        loss = 2 - 2 * F.cosine_similarity(p, z).mean()
        opt.zero_grad()
        loss.backward()  # or: DC102
        opt.step()  # or: DC102
        with torch.no_grad():
            for t, s in zip(target.parameters(), encoder.parameters(), strict=False):
                t.lerp_(s, 0.01)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
