"""An installed loss calls the model that it is given: the module inside the wrapper, from the loss of the script.

Source: huggingface/trl#7245's mechanism, with the library's own loss below a script's override.
Harm: gradients stay local. The library does what it is told: the line is the script's.
"""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "site-packages"))
from hooktrainer import compute_plain_loss, train
from torch.nn.parallel import DistributedDataParallel as DDP


def compute_loss(model, batch):
    base = model.module
    return compute_plain_loss(base, batch)  # raises: DC101


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
