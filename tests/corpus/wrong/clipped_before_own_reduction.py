"""Without a wrapper: gradients are clipped first and averaged by hand afterwards, in one flat buffer.

Source: tenstorrent/tt-metal#17568.
Harm: each rank scales by its own norm before the average; the rank with the larger gradients is heard least.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


def average_gradients(parameters):
    gradients = [p.grad for p in parameters]
    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, averaged in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(averaged)


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(4):
        x = torch.randn(8, 6)
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True) * (1 + 9 * dist.get_rank()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)  # raises: DC111
        average_gradients(parameters)
        optimizer.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
