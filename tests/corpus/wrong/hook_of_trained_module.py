"""The model is the trainer's own kind of object, and trains itself in a hook, which the trainer calls directly.

Source: a LightningModule's on_train_batch_end, in small: training_step goes through the wrapper, hooks do not.
Harm: the step in the hook uses gradients of this rank alone.
"""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "site-packages"))
from hooktrainer import HookedModule, Trainer


class Model(HookedModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch):
        return self.net(batch).square().mean()

    def on_batch_end(self, batch, optimizer):
        optimizer.zero_grad()
        self.penalty(batch).backward()
        optimizer.step()

    def penalty(self, batch):
        return self.net(batch).abs().mean()  # raises: DC101


def main():
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(1 + dist.get_rank())
    Trainer(model, optimizer).fit([torch.randn(16, 8) for _ in range(4)])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
