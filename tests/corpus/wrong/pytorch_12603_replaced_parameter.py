"""A weight is replaced by a new Parameter after the model was wrapped.

Source: pytorch/pytorch#12603 ("the backward hook has already registered on the old parameter").
Harm: the new weight's gradient is not reduced; the other parameters' are, but come through different weights.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 6 * 6, 10)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def load_pretrained_filters(net, generator):
    filters = torch.randn(4, 1, 3, 3, generator=generator)
    net.conv.weight = nn.Parameter(filters)  # raises: DC102


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(11)
    model = DDP(Net(), find_unused_parameters=True)
    load_pretrained_filters(model.module, torch.Generator().manual_seed(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(20 + rank)
    for step in range(4):
        images, labels = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # or: DC102
        optimizer.step()  # or: DC102
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
