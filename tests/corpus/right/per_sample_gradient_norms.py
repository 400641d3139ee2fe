"""Per-sample gradient norms by `torch.func` on the inner module, for logging only."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel as DDP


def per_sample_norms(module, x, y):
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss_of(params, xi, yi):
        return nn.functional.cross_entropy(functional_call(module, params, (xi[None],)), yi[None])

    grads = vmap(grad(loss_of), in_dims=(None, 0, 0))(params, x, y)
    return torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        x = torch.randn(12, 5)
        y = x[:, :3].argmax(1)
        norms = per_sample_norms(model.module, x, y)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f} norm {norms.mean():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
