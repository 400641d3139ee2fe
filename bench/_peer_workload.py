"""The script that `bench.peers` runs bare, under the watch and under the peers; a bypass on request.

It prints `MEDIAN_STEP_MS` from rank 0. Fabric wraps the model itself; everything else sees plain DDP.
"""

import argparse
import gc
import os
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

WARM_UP_STEPS = 3


class Net(nn.Module):
    """An MLP with a custom loss method: float32, inputs (batch, 64), 8 classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))

    def compute_loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self(x), y)


def loss_of(model, path: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if path == "call":
        return nn.functional.cross_entropy(model(x), y)
    if path == "inner_method":
        method = model.compute_loss if hasattr(model, "_forward_module") else model.module.compute_loss
        return method(x, y)
    if path == "submodules":
        return nn.functional.cross_entropy(model.module.head(model.module.encoder(x)), y)
    if path == "functional":
        logits = functional_call(model.module, dict(model.module.named_parameters()), (x,))
        return nn.functional.cross_entropy(logits, y)
    return nn.functional.cross_entropy(model.module(x), y)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--path", default="call")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--fabric", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(int(os.environ["RANK"]))
    net = Net(options.width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    if options.fabric:
        from lightning_fabric import Fabric  # pyright: ignore[reportMissingImports]

        fabric = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp")
        fabric.launch()
        model, optimizer = fabric.setup(net, optimizer)
        backward = fabric.backward
    else:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(net)
        backward = torch.Tensor.backward

    times = []
    for _ in range(options.steps):
        began = time.perf_counter()
        loss = loss_of(model, options.path, torch.randn(64, 64), torch.randint(0, 8, (64,)))
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        times.append(time.perf_counter() - began)
    if dist.get_rank() == 0:
        print(f"MEDIAN_STEP_MS {1000 * statistics.median(times[WARM_UP_STEPS:]):.4f}", flush=True)
    del model, optimizer
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
