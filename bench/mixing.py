"""What measuring the mixing matrix costs: a measured step against a bare one, the sketch, the judgment.

Two gloo ranks, one thread each; bare and measured steps in turn, in the same processes (A B A B). "collected" is a
step under a `MixingCollector` with its record taken, "measured" one inside `ddpcall.measure_mixing`: with the
exchange and the judgment. Printed are medians over rounds, and the range of their ratios. The judgment is timed
on simulated ranks: records of a model of 12 parameters that all ranks average, and the solve for weights alone.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench.step_time import ACCELERATOR, MODELS, make_config
from ddpcall.lab.data import load_split
from ddpcall.lab.models import build_model
from ddpcall.lab.world import World, launch_local_ranks, open_world, process_group
from ddpcall.mixing import MixingCollector, RankSketches, judge_records, measure_mixing
from ddpcall.mixing.record import PRESENT, Column
from ddpcall.mixing.shapes import find_eta, solve
from ddpcall.sketch import NUM_BUCKETS, sketch

ROUNDS = 9
NUM_PARAMETERS = 12


def seconds(run: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def make_large() -> nn.Module:
    """Return a model of 25 million parameters, most of them in six square layers."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(2040, 2040), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, 2040), *layers, nn.Linear(2040, 10))


def time_steps(model: nn.Module, batch: Any, steps: int) -> dict[str, list[float]]:
    """Return the seconds of a bare, a collected and a measured step, each round's median."""
    inputs, targets = batch
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(ddp(inputs), targets).backward()
        optimizer.step()

    def collect() -> None:
        step()
        collector.take()

    def measure() -> None:
        with measure_mixing(ddp, optimizer):
            step()

    times: dict[str, list[float]] = {"bare": [], "collected": [], "measured": []}
    for _ in range(3):
        step()
    for _ in range(ROUNDS):
        times["bare"].append(statistics.median(seconds(step) for _ in range(steps)))
        collector = MixingCollector.of_model(ddp, optimizer)
        collector.start()
        collect()
        times["collected"].append(statistics.median(seconds(collect) for _ in range(steps)))
        collector.stop()
        times["measured"].append(statistics.median(seconds(measure) for _ in range(max(1, steps // 4))))
    return times


def measure_steps(world: World, name: str, model: nn.Module, batch: Any, steps: int) -> str:
    """Return a line: the milliseconds and the ratios."""
    numel = sum(parameter.numel() for parameter in model.parameters())
    with process_group(world, ACCELERATOR, f"mixing {name}", 300):
        times = time_steps(model, batch, steps)
        gc.collect()
    line = f"{name} ({numel:,} parameters): bare {1000 * statistics.median(times['bare']):.2f} ms"
    for kind in ("collected", "measured"):
        ratios = sorted(ours / bare for ours, bare in zip(times[kind], times["bare"], strict=True))
        line += f"; {kind} {1000 * statistics.median(times[kind]):.2f} ms"
        line += f", ×{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
    return line


def on_ranks() -> int:
    """Run on every rank; rank 0 prints."""
    torch.set_num_threads(1)
    world = open_world()
    lines = []
    for model in MODELS:
        config = make_config(model)
        split = load_split(config.data, 0)
        items = [split.train[world.rank * config.data.batch_size + i] for i in range(config.data.batch_size)]
        batch = (torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items]))
        torch.manual_seed(0)
        lines.append(measure_steps(world, model, build_model(config.model, 64, 10), batch, 40))
    torch.manual_seed(0)
    batch = (torch.randn(8, 64) + world.rank, torch.arange(8))
    lines.append(measure_steps(world, "six large layers", make_large(), batch, 1))
    if world.rank == 0:
        print(*lines, sep="\n", flush=True)
    return 0


def measure_sketch(num_threads: int) -> None:
    """Print what a sketch costs, as multiples of `Tensor.sum`."""
    torch.set_num_threads(num_threads)
    cases = [
        ("16M float32", torch.randn(16 * 2**20)),
        ("64M float32", torch.randn(64 * 2**20)),
        ("16M float32, 4096 × 4096", torch.randn(4096, 4096)),
        ("64M bfloat16", torch.randn(64 * 2**20).bfloat16()),
        ("16M float32, memory transposed", torch.randn(4096, 4096).t()),
    ]
    for name, tensor in cases:
        ratios, times = [], []
        for _ in range(15):
            of_sum, of_sketch = seconds(tensor.sum), seconds(lambda t=tensor: sketch(t, "weight"))
            ratios.append(of_sketch / of_sum)
            times.append(of_sketch)
        ratios.sort()
        rate = tensor.numel() * tensor.element_size() / min(times) / 1e9
        print(
            f"sketch of {name}, {num_threads} thread(s): ×{statistics.median(ratios):.2f} of sum "
            f"({ratios[0]:.2f}–{ratios[-1]:.2f}), {rate:.1f} GB/s at best",
            flush=True,
        )
    small = torch.randn(64, 64)
    fastest = min(seconds(lambda: sketch(small, "weight")) for _ in range(200))
    print(f"sketch of 4,096 elements: {1e6 * fastest:.0f} µs", flush=True)


def make_records(num_ranks: int) -> list[RankSketches]:
    """Return the records of ranks that all used the mean."""
    rng = np.random.default_rng(0)
    own = rng.standard_normal((num_ranks, NUM_PARAMETERS, NUM_BUCKETS))
    nothing = np.zeros((NUM_PARAMETERS, NUM_BUCKETS))
    empty = ((),) * NUM_PARAMETERS
    digests = np.arange(NUM_PARAMETERS)
    return [
        RankSketches(
            rank=rank,
            names=tuple(f"layer{i}.weight" for i in range(NUM_PARAMETERS)),
            numel=(4096,) * NUM_PARAMETERS,
            dtypes=("float32",) * NUM_PARAMETERS,
            used=own.mean(axis=0),
            states=(PRESENT,) * NUM_PARAMETERS,
            own=own[rank],
            columns=tuple(Column(i, 0) for i in range(NUM_PARAMETERS)),
            carry=nothing,
            before=digests,
            after=digests,
            own_parts=empty,
            own_sum=empty,
            own_unit=empty,
            used_parts=empty,
            weight_parts=empty,
            num_steps=1,
        )
        for rank in range(num_ranks)
    ]


def measure_judgment() -> None:
    """Print what judging costs, and the solve for a matrix alone."""
    for num_ranks in (2, 16, 256, 4096):
        records = make_records(num_ranks)
        mixing = judge_records(records)
        judged = min(seconds(lambda r=records: judge_records(r)) for _ in range(3 if num_ranks < 1000 else 1))
        size = len(records[0].to_bytes()) / 1024
        line = f"judging {num_ranks} ranks, {NUM_PARAMETERS} parameters: {1000 * judged:.1f} ms ({mixing.shape}), "
        print(line + f"a record {size:.0f} KB", flush=True)
    for num_ranks in (2, 16, 256, 1024):
        columns = np.random.default_rng(0).standard_normal((num_ranks, max(NUM_BUCKETS, 4 * num_ranks)))
        used = columns.mean(axis=0, keepdims=True)
        solved = min(
            seconds(lambda c=columns, u=used, n=num_ranks: solve(c, u, find_eta("", n))) for _ in range(3)
        )
        print(f"solving for {num_ranks} weights of {columns.shape[1]} numbers: {1000 * solved:.1f} ms", flush=True)


if __name__ == "__main__":
    launch_local_ranks(on_ranks, 2)
    for threads in (1, 2):
        measure_sketch(threads)
    measure_judgment()
