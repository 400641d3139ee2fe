"""Ranks agree on one norm, all clip by it, and average by hand afterwards: every rank scales alike."""

import torch
import torch.distributed as dist
from torch import nn

MAX_NORM = 0.05


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(12):
        x = torch.randn(8, 6)
        loss = nn.functional.mse_loss(model(x), 10 * x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        norm = nn.utils.get_total_norm(gradients)
        dist.all_reduce(norm, op=dist.ReduceOp.MAX)
        nn.utils.clip_grads_with_norm_(model.parameters(), MAX_NORM, norm)
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        optimizer.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
