"""timm's `distribute_bn`: running statistics are averaged by hand, then everyone evaluates through `.module`.

Source: huggingface/pytorch-image-models#110.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


@torch.no_grad()
def distribute_bn(module):
    for name, buffer in module.named_buffers():
        if "running_mean" in name or "running_var" in name:
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(
        nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 2))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    images = torch.randn(16, 1, 8, 8)
    for epoch in range(2):
        for _ in range(2):
            x = torch.randn(8, 1, 8, 8) + rank
            loss = nn.functional.cross_entropy(model(x), torch.randint(0, 2, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        distribute_bn(model.module)
        model.eval()
        with torch.no_grad():
            share = model.module(images).argmax(1).float().mean()
        model.train()
        print(f"rank {rank} epoch {epoch} loss {loss.item():.4f} share {share:.3f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
