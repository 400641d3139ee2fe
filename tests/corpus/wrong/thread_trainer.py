"""A launcher runs the training function in a thread, as Ray Train does; the function unwraps.

Source: minimind#853's mechanism, in a thread, as launchers run a training function.
Harm: every rank trains a model of its own.
"""

import gc
import threading

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def train_func(config):
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    opt = torch.optim.SGD(model.parameters(), config["lr"])
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(config["steps"]):
        logits = model.module(torch.randn(8, 8))  # raises: DC101
        loss = F.cross_entropy(logits, torch.randint(0, 3, (8,)))
        opt.zero_grad()
        loss.backward()
        opt.step()


def main():
    thread = threading.Thread(target=train_func, args=({"lr": 0.1, "steps": 4},))
    thread.start()
    thread.join()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
