"""The epoch's last, incomplete accumulation window is stepped on, but all its micro-batches ran under
`no_sync()`.

Source: huggingface/accelerate#1726 and #2790 (what `accumulate` has to do at the end of a dataloader).
Harm: the last step of every epoch uses local gradients; all others are right.
"""
# begins: 2

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def run_epoch(model, optimizer, batches, accumulate, rank):
    for index, (x, y) in enumerate(batches):
        window_full = (index + 1) % accumulate == 0
        if window_full:
            loss = nn.functional.mse_loss(model(x), y) / accumulate
            loss.backward()
        else:
            with model.no_sync():  # raises: DC104
                loss = nn.functional.mse_loss(model(x), y) / accumulate  # or: DC104
                loss.backward()  # or: DC104
        if window_full or index + 1 == len(batches):
            optimizer.step()  # or: DC104
            optimizer.zero_grad()
            print(f"rank {rank} batch {index} loss {loss.item():.4f}", flush=True)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank + 5)
    model = DDP(nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.randn(8, 5), torch.randn(8, 1) + rank) for _ in range(8)]
    for _ in range(2):
        run_epoch(model, optimizer, batches, accumulate=3, rank=rank)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
