"""An installed trainer calls a loss function of the script's, which goes past the wrapper.

Source: huggingface/trl#7245's mechanism, in a function that a library is given.
Harm: gradients stay local.
"""

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
    policy = model.module if hasattr(model, "module") else model
    return policy(batch).square().mean()  # raises: DC101


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
