"""An installed trainer takes the model out of its wrapper for the loss; the script called the trainer rightly.

Source: huggingface/trl#7245's mechanism, where it lies: in the library.
Harm: gradients stay local. The line is the library's; the script's line that led there is named with it.
"""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "site-packages"))
from hooktrainer import train_unwrapped
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(1 + dist.get_rank())
    train_unwrapped(model, optimizer, [torch.randn(16, 8) for _ in range(5)])  # raises: DC101


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
