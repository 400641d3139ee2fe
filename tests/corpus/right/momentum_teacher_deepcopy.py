"""Self-distillation: the momentum teacher is a deep copy of the inner module and is never stepped."""

import copy
import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


@torch.no_grad()
def update_teacher(teacher, student, momentum=0.95):
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.lerp_(s, 1 - momentum)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    student = DDP(nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 8)))
    teacher = copy.deepcopy(student.module).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for step in range(5):
        x = torch.randn(16, 10)
        target = teacher(x + 0.1 * torch.randn_like(x)).softmax(-1)
        loss = -(target * student(x).log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_teacher(teacher, student.module)
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
