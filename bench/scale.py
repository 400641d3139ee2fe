"""How start-up and a training step grow from 1 to 8 ranks: the pool of the pytest plugin, the lab, and the watch.

    python -m bench.scale

Every figure is of one machine in one go, and the ratio is to two ranks: with more ranks than cores a step cannot
cost less than their number over that of the cores. The ranks of lab and watch are forked from a process that has
imported torch. A step is the median over the steps of the slowest rank.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpcall.ranks import RankPool
from tests.watch.launched import ForkedLauncher

RANKS = (1, 2, 4, 8)
STEPS = 60
TIMEOUT_S = 300.0


def train() -> float:
    """Train a small model; return the median step in ms."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model = DistributedDataParallel(inner) if dist.is_initialized() else inner
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        optimizer.zero_grad()
        model(torch.randn(16, 64)).square().mean().backward()
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[STEPS // 3 :])


SCRIPT = """
import os
import torch.distributed as dist
from bench.scale import train

if "RANK" in os.environ:
    dist.init_process_group("gloo")
open(f"step{os.environ.get('RANK', 0)}", "w").write(str(train()))
if dist.is_initialized():
    dist.destroy_process_group()
"""


def measure_pool(num_ranks: int) -> tuple[float, float, float]:
    """Return the seconds of the first task, which starts the ranks, of the next one, and a step in ms."""
    began = time.perf_counter()
    with RankPool() as pool:
        pool.run(train, num_ranks, timeout_s=TIMEOUT_S)
        started = time.perf_counter()
        outcomes = pool.run(train, num_ranks, timeout_s=TIMEOUT_S)
        ended = time.perf_counter()
    return started - began, ended - started, max(float(outcome.value) for outcome in outcomes)


def measure_launch(launcher: ForkedLauncher, num_ranks: int, *arguments: str) -> tuple[float, Path]:
    """Return the seconds of a launch, and its directory."""
    directory = Path(tempfile.mkdtemp(prefix="scale"))
    (directory / "train.py").write_text(SCRIPT)
    request = {"arguments": [*arguments], "directory": str(directory), "ranks": num_ranks}
    answer = launcher.launch(request, TIMEOUT_S)
    if answer is None or any(answer["codes"]):
        raise RuntimeError(f"{arguments} on {num_ranks} ranks: {answer}\n{(directory / 'err').read_text()}")
    return answer["seconds"], directory


def measure_watch(launcher: ForkedLauncher, num_ranks: int, every: str) -> tuple[float, float]:
    """Return the seconds of a launch and a step in ms, watched; `every` 0 compares and measures nothing."""
    options = ("--fail-on", "never", "--every", every)
    seconds, directory = measure_launch(launcher, num_ranks, "watch", *options, "train.py")
    return seconds, max(float(path.read_text()) for path in directory.glob("step*"))


def measure_lab(launcher: ForkedLauncher, num_ranks: int) -> tuple[float, float]:
    """Return the seconds of a run of one trial and its reference, and a step in ms with all probes."""
    options = (f"ranks={num_ranks}", f"steps={STEPS}", "tensorboard=false", "report=false", "device=cpu")
    seconds, directory = measure_launch(launcher, num_ranks, "train", *options, "hydra.run.dir=run")
    (record,) = map(json.loads, (directory / "run" / "evidence.jsonl").read_text().splitlines())
    return seconds, record["step_ms"]


def main() -> None:
    """Measure everything once for each number of ranks."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows: dict[str, dict[int, float]] = {}
    with ForkedLauncher("lab") as launcher:
        for ranks in RANKS:
            first_s, next_s, pool_ms = measure_pool(ranks)
            lab_s, lab_ms = measure_lab(launcher, ranks)
            watch_s, watch_ms = measure_watch(launcher, ranks, "100")
            figures = {
                "pool: first task, s": first_s, "pool: next task, s": next_s, "pool: step, ms": pool_ms,
                "lab: a trial and its reference, s": lab_s, "lab: step with all probes, ms": lab_ms,
                "watch: a script, s": watch_s, "watch: step, ms": watch_ms,
            }  # fmt: skip
            for name, figure in figures.items():
                rows.setdefault(name, {})[ranks] = figure
    print(f"| {os.cpu_count()} cores | " + " | ".join(f"{ranks} ranks" for ranks in RANKS) + " |")
    print("| --- " * (len(RANKS) + 1) + "|")
    for name, row in rows.items():
        cells = [f"{row[ranks]:.2f} (×{row[ranks] / row[2]:.2f})" for ranks in RANKS]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
