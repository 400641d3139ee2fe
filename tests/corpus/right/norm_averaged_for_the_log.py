"""The gradients' norm is sent over the ranks for the log, before and after it is clipped by the right one."""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

MAX_NORM = 0.5


def log(norm):
    norm = norm.clone()
    dist.all_reduce(norm)
    return norm / dist.get_world_size()


def clip_by_torch(parameters):
    log(nn.utils.clip_grad_norm_(parameters, float("inf")))
    log(nn.utils.clip_grad_norm_(parameters, MAX_NORM))


def clip_by_hand(parameters):
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    dist.all_reduce(norm)
    norm /= dist.get_world_size()
    for parameter in parameters:
        parameter.grad.mul_((MAX_NORM / norm).clamp(max=1.0))


def clip_by_the_norm_before(parameters):
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    log(norm)
    for parameter in parameters:
        parameter.grad.mul_((MAX_NORM / norm).clamp(max=1.0))


def clip_by_largest(parameters):
    squared = torch.stack([p.grad.pow(2).sum() for p in parameters]).sum()
    dist.all_reduce(squared, op=dist.ReduceOp.MAX)
    nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, squared.sqrt())


def main():
    torch.manual_seed(0)
    models = [DDP(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))) for _ in range(4)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    clips = (clip_by_torch, clip_by_hand, clip_by_the_norm_before, clip_by_largest)
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(4):
        for model, optimizer, clip in zip(models, optimizers, clips, strict=True):
            x = torch.randn(8, 6)
            loss = nn.functional.mse_loss(model(x), 10 * x.sum(1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            dist.all_reduce(loss.detach())
            clip(list(model.parameters()))
            optimizer.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
