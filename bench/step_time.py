"""A trial's step time against a hand-written DDP loop of the same model and data, probes off and on.

Two gloo ranks; bare, off, on, all, bare, off, on, all … in the same processes. "on" is the default, in which the
hooks probe leaves after 20 of the 200 steps; "all" keeps it for every step. A round's figure is the mean over its
steps, the first left out; printed are the median and the spread of the rounds' ratios.
"""

import gc
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from ddpcall.evidence import Cell
from ddpcall.lab.data import Split, load_split
from ddpcall.lab.models import build_model
from ddpcall.lab.schema import DataConfig, OptimizerConfig, PathConfig, TrainConfig, WrapperConfig
from ddpcall.lab.trial import Trial
from ddpcall.lab.world import Accelerator, World, launch_local_ranks, open_world, process_group

ROUNDS = 7
STEPS = 200
MODELS = ("Mlp", "ConvNet", "RowTransformer")
ACCELERATOR = Accelerator(torch.device("cpu"), "gloo")


def make_config(model: str) -> TrainConfig:
    """Return the configuration of one trial: the demo's data and optimizer."""
    return TrainConfig(
        steps=STEPS,
        wrapper=WrapperConfig(name="ddp"),
        path=PathConfig(name="call"),
        model={"_target_": f"ddpcall.lab.models.{model}"},
        data=DataConfig(name="digits"),
        optimizer=OptimizerConfig(name="sgd", lr=0.01, momentum=0.9),
    )


def run_bare_loop(world: World, name: str, config: TrainConfig, split: Split) -> list[float]:
    """Train as a user would write it; return the milliseconds of each step."""
    times = []
    with process_group(world, ACCELERATOR, name, 60):
        torch.manual_seed(0)
        model = DistributedDataParallel(build_model(config.model, 64, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        sampler = DistributedSampler(split.train, shuffle=True, seed=0, drop_last=True)
        loader = DataLoader(split.train, batch_size=config.data.batch_size, sampler=sampler, drop_last=True)
        epoch = 0
        while len(times) < STEPS:
            sampler.set_epoch(epoch)
            for inputs, targets in loader:
                began = time.perf_counter()
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), targets)
                loss.backward()
                optimizer.step()
                loss.item()
                times.append((time.perf_counter() - began) * 1000)
            epoch += 1
        del model, optimizer, loss
        gc.collect()
    return times[1:STEPS]


def run_trial(
    world: World, name: str, config: TrainConfig, split: Split, *, observe: bool, hook_steps: int = 20
) -> list[float]:
    """Run the lab's trial; return the milliseconds of each step."""
    config.probes.hook_steps = hook_steps
    cell = Cell(wrapper="ddp", path="call", model=config.model["_target_"])
    report = Trial(cell, config, split, world, ACCELERATOR, observe=observe).run(name)
    assert report.failure is None, report.failure
    return report.step_ms[1:]


def measure() -> int:
    """Run on every rank; rank 0 prints."""
    world = open_world()
    for model in MODELS:
        config = make_config(model)
        split = load_split(config.data, 0)
        means: dict[str, list[float]] = {"bare": [], "off": [], "on": [], "all": []}
        for index in range(ROUNDS):
            prefix = f"{model}{index}"
            kinds: list[Any] = [
                ("bare", lambda n=prefix, c=config, s=split: run_bare_loop(world, f"{n}bare", c, s)),
                ("off", lambda n=prefix, c=config, s=split: run_trial(world, f"{n}off", c, s, observe=False)),
                ("on", lambda n=prefix, c=config, s=split: run_trial(world, f"{n}on", c, s, observe=True)),
                (
                    "all",
                    lambda n=prefix, c=config, s=split: run_trial(
                        world, f"{n}all", c, s, observe=True, hook_steps=0
                    ),
                ),
            ]
            for kind, run in kinds:
                means[kind].append(statistics.mean(run()))
        if world.rank == 0:
            report(model, means)
    return 0


def report(model: str, means: dict[str, list[float]]) -> None:
    """Print the median ratios to the bare loop, and the range they took over the rounds."""
    bare = means["bare"]
    line = f"{model}: bare loop {statistics.median(bare):.3f} ms a step"
    for kind, target in (("off", ", target 1.03"), ("on", ", target 1.5"), ("all", "")):
        ratios = sorted(ours / theirs for ours, theirs in zip(means[kind], bare, strict=True))
        middle, least, most = statistics.median(ratios), ratios[0], ratios[-1]
        line += f"; probes {kind} ×{middle:.3f} ({least:.2f}–{most:.2f}{target})"
    print(line, flush=True)


if __name__ == "__main__":
    assert not dist.is_initialized()
    launch_local_ranks(measure, 2)
