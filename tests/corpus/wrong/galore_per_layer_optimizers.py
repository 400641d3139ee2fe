"""Layer-wise optimizers: gradient hooks step and release each layer to save memory, as low-rank optimizers offer.

Source: kohya-ss/musubi-tuner#679's mechanism with AdamW in a class of its own; verl-project/verl#2558 asks for it.
Harm: each layer is stepped before the bucket it is in has been reduced.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class LayerwiseOptimizer:
    def __init__(self, model, lr):
        self.optimizers = {}
        for param in model.parameters():
            self.optimizers[param] = torch.optim.AdamW([param], lr=lr, weight_decay=0.0)
            param.register_post_accumulate_grad_hook(self._update)  # or: DC105

    def _update(self, param):
        optimizer = self.optimizers[param]
        optimizer.step()  # raises: DC105
        optimizer.zero_grad()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(10, 30), nn.SiLU(), nn.Linear(30, 10)))
    LayerwiseOptimizer(model, lr=1e-2)  # or: DC105
    for step in range(4):
        x = torch.randn(8, 10)
        loss = nn.functional.mse_loss(model(x), x.roll(rank + 1, 1))
        loss.backward()  # or: DC105
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
