"""What the timeline, the accuracy and the distance by step cost: forward_bypass's trials with and without them.

Two gloo ranks; with, without, with, without … in the same processes, all other probes on. Printed are the median
and the spread of the rounds' ratios, in wall-clock time and in this rank's processor time. Distances are always
measured, so "without" still has them.
"""

import statistics
import time

import torch.distributed as dist

from bench.step_time import ACCELERATOR, make_config
from ddpcall.evidence import Cell
from ddpcall.lab.data import Split, load_split
from ddpcall.lab.schema import ProbesConfig, TrainConfig
from ddpcall.lab.trial import Trial
from ddpcall.lab.world import World, launch_local_ranks, open_world
from ddpcall.paths import CallPath

ROUNDS = 7
STEPS = 60
MODELS = ("Mlp", "ConvNet")
KINDS = {
    "timeline and accuracy": ProbesConfig(),
    "timeline": ProbesConfig(accuracy_every=0),
    "neither": ProbesConfig(timeline=False, accuracy_every=0),
}


def run_experiment(world: World, name: str, config: TrainConfig, split: Split) -> tuple[float, float]:
    """Train along every call path; return the seconds by the clock, and of this process's processor time."""
    began, began_cpu = time.perf_counter(), time.process_time()
    for path in CallPath:
        if path is CallPath.CUSTOM:
            continue
        cell = Cell(wrapper="ddp", path=path, model=config.model["_target_"])
        report = Trial(cell, config, split, world, ACCELERATOR, observe=True).run(f"{name}{path}")
        assert report.failure is None, report.failure
    return time.perf_counter() - began, time.process_time() - began_cpu


def measure() -> int:
    """Run on every rank; rank 0 prints."""
    world = open_world()
    for model in MODELS:
        config = make_config(model)
        config.steps = STEPS
        split = load_split(config.data, 0)
        seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        for index in range(ROUNDS + 1):
            for kind, probes in KINDS.items():
                config.probes = probes
                seconds[kind].append(run_experiment(world, f"{model}{index}{kind}", config, split))
        if world.rank == 0:
            report(model, {kind: rounds[1:] for kind, rounds in seconds.items()})
    return 0


def report(model: str, seconds: dict[str, list[tuple[float, float]]]) -> None:
    """Print the ratios to the same trials without either; the target stands for the whole."""
    line = f"{model}: {statistics.median(wall for wall, _ in seconds['neither']):.2f} s without either"
    for kind in list(KINDS)[:-1]:
        for clock, name in enumerate(("wall", "processor")):
            pairs = zip(seconds[kind], seconds["neither"], strict=True)
            ratios = sorted(ours[clock] / theirs[clock] for ours, theirs in pairs)
            line += f"; {kind} ×{statistics.median(ratios):.3f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) {name}"
    print(line + " (target for both together: 1.2)", flush=True)


if __name__ == "__main__":
    assert not dist.is_initialized()
    launch_local_ranks(measure, 2)
