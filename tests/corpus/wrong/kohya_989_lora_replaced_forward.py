"""LoRA by replacing `forward`: the adapters are wrapped, but only the base network is ever called.

Source: kohya-ss/sd-scripts#989 ("we apply the lora through replacing the forward() method instead of the
module, the DDP lora won't sync gradients automatically"); mended there by a manual reduce.
Harm: the adapters' gradients arrive at a reducer that was never armed.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class LoRAModule(nn.Module):
    def __init__(self, org_module, rank=2, scale=1.0):
        super().__init__()
        self.lora_down = nn.Linear(org_module.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, org_module.out_features, bias=False)
        nn.init.normal_(self.lora_up.weight, std=0.02)
        self.scale = scale
        self.org_forward = org_module.forward
        org_module.forward = self.forward

    def forward(self, x):
        return self.org_forward(x) + self.scale * self.lora_up(self.lora_down(x))  # or: DC101


class LoRANetwork(nn.Module):
    def __init__(self, base):
        super().__init__()
        linears = [m for m in base.modules() if isinstance(m, nn.Linear)]
        self.loras = nn.ModuleList(LoRAModule(m) for m in linears)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    unet = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 8))
    unet.requires_grad_(False)
    network = DDP(LoRANetwork(unet))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    torch.manual_seed(100 + rank)
    for step in range(4):
        latents, noise = torch.randn(16, 8), torch.randn(16, 8)
        prediction = unet(latents + noise)  # raises: DC101
        loss = nn.functional.mse_loss(prediction, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
