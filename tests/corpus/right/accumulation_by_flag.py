"""nanoGPT's way, in the right order: the flag is set before the forward of each micro-step."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(1337 + rank)
    model = DDP(nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 30)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps = 4
    for it in range(4):
        for micro_step in range(steps):
            model.require_backward_grad_sync = micro_step == steps - 1
            ids = torch.randint(0, 30, (4, 9))
            loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()) / steps
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"rank {rank} iter {it} loss {loss.item() * steps:.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
