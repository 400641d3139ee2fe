"""A trainer prepares the reducer by hand before the main loss's backward, and forgets the auxiliary one's.

Source: the class of Lightning's manual optimization with `loss.backward()` in place of `manual_backward(loss)`.
Harm: the auxiliary loss's gradients are those of each rank's own batch.
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
        self.ddp.require_backward_grad_sync = False  # or: DC104
        outputs = self.ddp(x)  # or: DC101, DC104
        self.ddp.require_backward_grad_sync = True
        return outputs

    def manual_backward(self, loss):
        self.ddp.reducer.prepare_for_backward([])
        loss.backward()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    trainer = Trainer(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)))
    for step in range(4):
        trainer.optimizer.zero_grad()
        loss = trainer.forward(torch.randn(12, 6)).square().mean()
        trainer.manual_backward(loss)
        auxiliary = (trainer.forward(torch.randn(12, 6)) - 1).abs().mean()
        auxiliary.backward()  # raises: DC101|DC104
        trainer.optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
