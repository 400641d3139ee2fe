"""A bound `forward`, stored before wrapping "to save a lookup", is what the loop calls.

Source: ecmwf/WeatherGenerator#1639 (an aliased `model.forward` skips the wrapper's hooks; there FSDP, here DDP).
Harm: the alias belongs to the inner module; gradients stay local.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(9, 18)
        self.head = nn.Linear(18, 9)

    def forward(self, state):
        return state + self.head(torch.relu(self.embed(state)))


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = Forecaster()
    forecast = model.forward
    model = DDP(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(4):
        state = torch.randn(8, 9)
        prediction = forecast(state)  # raises: DC101
        loss = nn.functional.mse_loss(prediction, state.roll(1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
