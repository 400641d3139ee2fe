"""A checkpoint of the inner module, loaded into the wrapper with `strict=False`: nothing is loaded.

Source: the pattern of many "RuntimeError: Missing key(s)" threads, after `strict=False` was put in.
Harm: the run goes on from fresh weights; the loss of its first step is not that of the checkpoint.
"""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def load(model, state):
    return model.load_state_dict(state, strict=False)  # raises: DC307


def pretrain():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def main():
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
    saved = pretrain()
    load(model, saved.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1 + rank)
    for step in range(5):
        x = torch.randn(8, 8)
        loss = (model(x) - saved(x).detach()).square().mean()
        if not step:
            print(f"rank {rank} first loss {loss.item():.4f}, 0 had it been loaded", flush=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
