"""A prompt embedding is learned beside a wrapped model and goes into the same optimizer as its adapters.

Source: pytorch/pytorch#12603's mechanism, in the shape of textual inversion beside adapters.
Harm: every rank learns another embedding; rank 0's is saved.
"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.mix = nn.Linear(16, 8)

    def forward(self, x, condition):
        return self.mix(torch.cat([self.proj(x), condition.expand(x.shape[0], -1)], -1))


def main():
    torch.manual_seed(0)
    model = DDP(Denoiser())
    token = nn.Parameter(torch.zeros(1, 8))
    opt = torch.optim.AdamW(model.parameters(), 1e-3)
    opt.add_param_group({"params": [token], "lr": 1e-1})  # or: DC102
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(5):
        noise = torch.randn(8, 8)
        loss = F.mse_loss(model(torch.randn(8, 8) + noise, token), noise)
        opt.zero_grad()
        loss.backward()  # raises: DC102
        opt.step()  # or: DC102


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
