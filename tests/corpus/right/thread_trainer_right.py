"""The training function runs in a thread, a second thread evaluates a copy."""

import copy
import gc
import threading

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def train_func():
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    opt = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(4 + dist.get_rank())
    scores = []

    def evaluate(snapshot):
        with torch.no_grad():
            scores.append(snapshot(torch.randn(4, 8)).mean().item())

    for _ in range(4):
        loss = F.cross_entropy(model(torch.randn(8, 8)), torch.randint(0, 3, (8,)))
        opt.zero_grad()
        loss.backward()
        opt.step()
        side = threading.Thread(target=evaluate, args=(copy.deepcopy(model.module).eval(),))
        side.start()
        side.join()
    assert len(scores) == 4


def main():
    thread = threading.Thread(target=train_func)
    thread.start()
    thread.join()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
