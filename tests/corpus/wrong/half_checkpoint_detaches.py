"""The model is converted to bfloat16 to be saved and back, once, in the middle of training.

Source: pytorch/pytorch#104336, met through checkpointing in half precision.
Harm: local gradients after the checkpoint. (The weights also lose their low bits, equally on all ranks.)
"""
# begins: 2

import gc
import io
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Checkpointer:
    def __init__(self, model):
        self.model = model

    def save(self, stream):
        net = self.model.module
        net.to(torch.bfloat16)  # raises: DC103
        torch.save(net.state_dict(), stream)
        net.to(torch.float32)  # or: DC103


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(8 + rank)
    model = DDP(nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpointer = Checkpointer(model)
    for step in range(6):
        x = torch.randn(10, 6)
        loss = nn.functional.l1_loss(model(x), x.roll(1, dims=1) * (1 + rank))
        optimizer.zero_grad()
        loss.backward()  # or: DC103
        optimizer.step()  # or: DC103
        if step == 1:
            checkpointer.save(io.BytesIO())  # or: DC103
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
