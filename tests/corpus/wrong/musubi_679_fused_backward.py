"""Fused backward: each parameter is stepped in its post-accumulate hook, to free its gradient at once.

Source: kohya-ss/musubi-tuner#679 (the hook is called before DDP has reduced the gradient).
Harm: every step uses local gradients; the reduction that follows finds nothing to reduce.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class DiT(nn.Module):
    def __init__(self, dim=12):
        super().__init__()
        self.time = nn.Linear(1, dim)
        self.blocks = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))

    def forward(self, x, t):
        for block in self.blocks:
            x = x + torch.nn.functional.silu(block(x + self.time(t)))
        return x


def enable_fused_backward(model, lr):
    optimizers = {p: torch.optim.SGD([p], lr=lr) for p in model.parameters()}

    def step_parameter(p):
        optimizers[p].step()  # raises: DC105
        optimizers[p].zero_grad(set_to_none=False)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_parameter)  # or: DC105


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(33 + rank)
    model = DDP(DiT())
    enable_fused_backward(model, lr=0.05)
    for step in range(4):
        x, t = torch.randn(8, 12), torch.rand(8, 1)
        noise = torch.randn_like(x)
        loss = nn.functional.mse_loss(model(x + t * noise, t), noise)
        loss.backward()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
