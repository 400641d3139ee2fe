"""The loss is a compiled function around the inner model: one graph, no frame of any module's at run time.

Source: pytorch/pytorch#141616's way of compiling what is no module, with huggingface/trl#7245's unwrapped model.
Harm: gradients stay local. A watch that interposed on torch functions here would break `fullgraph=True`.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
    inner = model.module
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile(backend="eager", fullgraph=True)
    def compute_loss(x):
        return nn.functional.mse_loss(inner(x), x)  # or: DC101

    torch.manual_seed(1 + rank)
    for step in range(5):
        loss = compute_loss(torch.randn(4, 8))  # raises: DC101
        optimizer.zero_grad()
        loss.backward()  # or: DC101
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
