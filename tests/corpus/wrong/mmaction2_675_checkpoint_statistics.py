"""Rank 0 writes the checkpoint, with running statistics that are rank 0's alone.

Source: open-mmlab/mmaction2#675 and open-mmlab/mmdetection#4582 (the accuracy in the log is not the
checkpoint's).
Harm: the saved buffers summarise one shard of the data; the other ranks' statistics are lost.
"""
# begins: 4

import gc
import io
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Recognizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ReLU())
        self.cls_head = nn.Linear(6, 4)

    def forward(self, clip):
        return self.cls_head(self.stem(clip).mean(-1))


def save_checkpoint(model, rank):
    if rank == 0:
        stream = io.BytesIO()
        torch.save(model.module.state_dict(), stream)  # raises: DC205
        print(f"saved {stream.tell()} bytes", flush=True)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(Recognizer())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=1e-4)
    for step in range(4):
        clip = torch.randn(8, 2, 16) * (1 + 3 * rank)
        loss = nn.functional.cross_entropy(model(clip), torch.randint(0, 4, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)
    save_checkpoint(model, rank)  # or: DC205


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
