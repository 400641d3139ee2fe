"""An installed trainer is given the wrapped model and a loss function that calls it, and looks inside it."""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "site-packages"))
from hooktrainer import train
from torch.nn.parallel import DistributedDataParallel as DDP


def compute_loss(model, batch):
    assert isinstance(model.module, nn.Sequential)
    with torch.no_grad():
        target = model.module(batch)
    return (model(batch) - 0.5 * target).square().mean()


def main():
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(1 + dist.get_rank())
    train(model, optimizer, [torch.randn(16, 8) for _ in range(5)], compute_loss)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
