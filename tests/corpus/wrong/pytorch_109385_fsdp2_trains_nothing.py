"""fully_shard, and a loss method that calls `self.forward`: an evaluation left the weights gathered, so it runs.

Source: pytorch/pytorch#109385, #123962 (methods other than forward), where it crashed; the root does not reshard
after its forward, so behind an evaluation it does not crash.
Harm: the gradients stay on the gathered weights, the shards get none, and nothing is trained, silently.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 24)
        self.fc2 = nn.Linear(24, 1)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))

    def compute_loss(self, x, y):
        return nn.functional.mse_loss(self.forward(x), y)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = Regressor()
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(10 + rank)
    for step in range(4):
        x = torch.randn(16, 6)
        with torch.no_grad():
            before = model(x).mean()
        loss = model.compute_loss(x, x.sum(dim=1, keepdim=True))  # raises: DC306
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f} {before.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
