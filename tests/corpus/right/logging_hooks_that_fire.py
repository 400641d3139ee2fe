"""Hooks of every kind for logging, all of which fire: forward, backward, gradient, accumulate and optimizer
hooks."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    counts = dict.fromkeys(("forward", "backward", "gradient", "accumulated", "step"), 0)

    def count(kind):
        counts[kind] += 1

    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))
    model = DDP(net)
    model.register_forward_hook(lambda *args: count("forward"))
    net[0].register_forward_hook(lambda *args: count("forward"))
    net[2].register_full_backward_hook(lambda *args: count("backward"))
    net[0].weight.register_hook(lambda grad: count("gradient"))
    net[0].weight.register_post_accumulate_grad_hook(lambda param: count("accumulated"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer.register_step_post_hook(lambda *args: count("step"))
    for step in range(4):
        x = torch.randn(8, 6)
        loss = nn.functional.mse_loss(model(x), x[:, :2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1:
            net[1].register_forward_hook(lambda *args: count("forward"))
        print(f"rank {rank} step {step} loss {loss.item():.4f} {counts}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
