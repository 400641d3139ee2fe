"""A trainer runs its forwards with synchronisation off, and prepares the reducer before each backward itself.

Source: the class of Lightning's manual optimization, `prepare_for_backward` in
lightning/pytorch/overrides/distributed.py: several backwards of one forward, each reduced.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Trainer:
    def __init__(self, model):
        self.ddp = DDP(model)
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=0.1)

    def forward(self, x):
        self.ddp.require_backward_grad_sync = False
        outputs = self.ddp(x)
        self.ddp.require_backward_grad_sync = True
        return outputs

    def backward(self, loss, retain_graph=False):
        self.ddp.reducer._rebuild_buckets()
        self.ddp.reducer.prepare_for_backward([])
        loss.backward(retain_graph=retain_graph)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    trainer = Trainer(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)))
    for step in range(4):
        outputs = trainer.forward(torch.randn(12, 6))
        for column in range(2):
            loss = (outputs[:, column] - 1).square().mean()
            trainer.optimizer.zero_grad()
            trainer.backward(loss, retain_graph=column == 0)
        trainer.optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
