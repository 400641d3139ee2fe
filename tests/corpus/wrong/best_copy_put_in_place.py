"""Early stopping puts a deep copy of the best model where the trained one was, inside the wrapper.

Source: pytorch/pytorch#12603 (what is replaced after wrapping has no reducer), as a checkpoint callback.
Harm: from then on the reducer owns parameters that nobody trains.
"""
# begins: 3

import copy
import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class BestModel:
    def save(self, model):
        self.best = copy.deepcopy(model.module)

    def restore(self, model):
        model.module = copy.deepcopy(self.best)  # raises: DC102|DC101
        return torch.optim.Adam(model.parameters(), lr=1e-2)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), find_unused_parameters=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    torch.manual_seed(1 + rank)
    best = BestModel()
    for step in range(7):
        if step == 1:
            best.save(model)
        if step == 3:
            optimizer = best.restore(model)
        loss = model(torch.randn(8, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
