"""Accumulation as documented: forward and backward of the early micro-batches inside `no_sync()`, the last
outside.

Source: the mended form of modelscope/FunASR#3472 and karpathy/build-nanogpt#30.
"""

import contextlib
import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(6, 18), nn.Tanh(), nn.Linear(18, 3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accumulate = 3
    for step in range(4):
        optimizer.zero_grad()
        for micro_step in range(accumulate):
            last = micro_step == accumulate - 1
            with contextlib.nullcontext() if last else model.no_sync():
                x = torch.randn(8, 6)
                loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)) / accumulate
                loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
