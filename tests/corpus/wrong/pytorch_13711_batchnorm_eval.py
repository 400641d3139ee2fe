"""Every rank evaluates its shard through `.module` after training: BatchNorm's running statistics differ.

Source: pytorch/pytorch#13711 (the same image gives different outputs on different GPUs), pytorch/pytorch#30718.
Harm: DDP broadcasts buffers at the start of the next training forward; after the last one they differ, and so
does the model that each rank evaluates.
"""
# begins: 2

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).mean(dim=(2, 3)))


@torch.no_grad()
def evaluate(model, images, labels):
    model.eval()
    logits = model.module(images)  # raises: DC205
    model.train()
    correct = (logits.argmax(1) == labels).sum().float()
    dist.all_reduce(correct)
    return correct.item() / (len(labels) * dist.get_world_size()), logits.sum().item()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(ConvNet())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(32) % 5
    for epoch in range(2):
        for _ in range(2):
            x = torch.randn(8, 3, 8, 8) * (rank + 1) + rank
            loss = nn.functional.cross_entropy(model(x), torch.randint(0, 5, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy, checksum = evaluate(model, images, labels)  # or: DC205
        print(f"rank {rank} epoch {epoch} accuracy {accuracy:.3f} checksum {checksum:.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
