"""The trainer wraps the model for the optimizer, but steps the object it kept.

Source: NCAR/miles-credit#153 (the wrapper is removed before the training step).
Harm: `self.net` is the user's own module; its forward never meets DDP and the gradients stay local.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class WeatherNet(nn.Module):
    def __init__(self, variables=5):
        super().__init__()
        self.conv1 = nn.Conv2d(variables, 12, 3, padding=1)
        self.norm = nn.GroupNorm(3, 12)
        self.conv2 = nn.Conv2d(12, variables, 3, padding=1)

    def forward(self, state):
        return state + self.conv2(torch.nn.functional.gelu(self.norm(self.conv1(state))))


class Trainer:
    def __init__(self, net):
        self.net = net
        self.distributed_model = DistributedDataParallel(net)
        self.optimizer = torch.optim.AdamW(self.distributed_model.parameters(), lr=1e-3, weight_decay=0.01)

    def train_one_epoch(self, batches):
        self.distributed_model.train()
        for x, y in batches:
            prediction = self.net(x)  # raises: DC101
            loss = (prediction - y).abs().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield loss.item()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(5)
    net = WeatherNet()
    torch.manual_seed(50 + rank)
    batches = [(torch.randn(3, 5, 8, 8), torch.randn(3, 5, 8, 8)) for _ in range(4)]
    for step, loss in enumerate(Trainer(net).train_one_epoch(batches)):
        print(f"rank {rank} step {step} mae {loss:.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
