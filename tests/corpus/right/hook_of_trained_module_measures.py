"""The same trainer and module as in hook_of_trained_module: the hook measures, and trains nothing."""

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
        self.seen = []

    def training_step(self, batch):
        return self.net(batch).square().mean() + self.penalty(batch)

    def on_batch_end(self, batch, optimizer):
        self.seen.append(self.penalty(batch).detach())

    def penalty(self, batch):
        return self.net(batch).abs().mean()


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
