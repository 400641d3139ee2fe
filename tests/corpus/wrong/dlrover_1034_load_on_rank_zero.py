"""Resume: rank 0 loads the checkpoint into the wrapped model, the others keep their fresh weights.

Source: intelligent-machine-learning/dlrover#1034 ("all ranks of DDP should load the checkpoint"),
pytorch/vision#2142.
Harm: gradients are reduced, the replicas differ.
"""

import gc
import io
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def build():
    return nn.Sequential(nn.Linear(9, 27), nn.ReLU(), nn.Linear(27, 3))


def pretrained_checkpoint():
    torch.manual_seed(123)
    stream = io.BytesIO()
    torch.save({"model": build().state_dict(), "epoch": 7}, stream)
    stream.seek(0)
    return stream


def main():
    rank = int(os.environ["RANK"])
    checkpoint = pretrained_checkpoint()
    torch.manual_seed(rank)
    model = DDP(build())
    if rank == 0:
        state = torch.load(checkpoint, weights_only=True)
        model.module.load_state_dict(state["model"])  # raises: DC202
    dist.barrier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(4):
        x = torch.randn(12, 9)
        loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
