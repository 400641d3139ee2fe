"""Clipped once, after the average: by DDP with accumulation, and by hand. Under no_sync the limit never cuts."""

import contextlib
import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

ACCUMULATE = 2


def make():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))


def loss_of(model):
    x = torch.randn(8, 6)
    return nn.functional.mse_loss(model(x), x.sum(1, keepdim=True) * (1 + 9 * dist.get_rank()))


def step_of_ddp(model, optimizer):
    optimizer.zero_grad()
    for index in range(ACCUMULATE):
        last = index == ACCUMULATE - 1
        with contextlib.nullcontext() if last else model.no_sync():
            (loss_of(model) / ACCUMULATE).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))  # for the log
    assert norm > 0.5
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()


def step_by_hand(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    nn.utils.clip_grad_value_(model.parameters(), 0.1)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def main():
    torch.manual_seed(0)
    model, by_hand = DDP(make()), make()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, by_hand)]
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(4):
        step_of_ddp(model, optimizers[0])
        step_by_hand(by_hand, optimizers[1])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
