"""What the watch costs: step time with and without it, memory, and start-up.

Two gloo ranks; bare, watched, bare, watched … in the same processes, a fresh model each time. Default settings:
vitals are compared after each of the first 16 steps, then every tenth; gradients are measured in those 16, at 32,
64, 128 …, then every thousandth. A round's figure is put together from the medians of its steps from the 21st on,
as a thousand steps have them: 900 plain ones, 99 with vitals, one measured. A machine that others use makes single
steps slow, and means say nothing. Printed are the median and the spread of the rounds' ratios, in processor time
of all threads.
"""

import gc
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddpcall
from ddpcall.ranks import run_on_ranks

ROUNDS = 9
STEPS = 140
WARM_UP = 20
EVERY = 10  # the default
MEASURED = (32, 64, 128)
STARTS = 5
TENSORS = 2_000


def build_toy() -> tuple[nn.Module, torch.Tensor]:
    """Return 200 tiny layers and a batch: the worst case for a cost per layer and parameter."""
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(200))), torch.randn(8, 16)


def build_wide() -> tuple[nn.Module, torch.Tensor]:
    """Return a model whose step takes at least 50 ms on two cores, and a batch."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(512, 1024)


BUILD = {"toy": build_toy, "wide": build_wide}


def run_round(name: str) -> float:
    """Train a fresh model; return the typical milliseconds of processor time of a step."""
    torch.manual_seed(0)
    inner, batch = BUILD[name]()
    batch += dist.get_rank()
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    taken: list[float] = []
    for _ in range(STEPS):
        began = time.process_time()
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        taken.append(1000 * (time.process_time() - began))
    del model, optimizer
    gc.collect()
    dist.barrier()
    steps = [(step, ms) for step, ms in enumerate(taken, 1) if step > WARM_UP]
    measured = [ms for step, ms in steps if step in MEASURED]
    with_vitals = [ms for step, ms in steps if step % EVERY == 0]
    plain = [ms for step, ms in steps if step % EVERY and step not in MEASURED]
    return (
        0.9 * statistics.median(plain)
        + 0.099 * statistics.median(with_vitals)
        + 0.001 * statistics.median(measured)
    )


def run_watched_round(name: str) -> float:
    """Do the same under a watch."""
    with ddpcall.watch(on_finding="record") as session:
        milliseconds = run_round(name)
    assert all(finding.code in ("DC206", "DC207") for finding in session.findings), session.findings
    return milliseconds


def measure_rounds(name: str) -> list[tuple[float, float]]:
    """Return (bare, watched) milliseconds of a step by round."""
    torch.set_num_threads(1)
    run_round(name)
    return [(run_round(name), run_watched_round(name)) for _ in range(ROUNDS)]


def measure_memory() -> float:
    """Return the bytes that watching takes for a model of `TENSORS` parameter tensors."""
    model = DistributedDataParallel(nn.Sequential(*(nn.Linear(2, 2) for _ in range(TENSORS // 2))))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        model(torch.randn(2, 2)).mean().backward()
        optimizer.step()

    step()
    tracemalloc.start()
    with ddpcall.watch(model, on_finding="record"):
        step()
        step()
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return float(taken)


def measure_start(arguments: list[str]) -> float:
    """Return the seconds that an interpreter takes for a script that imports torch and leaves."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    for name, target in (("toy", 1.05), ("wide", 1.01)):
        rounds = run_on_ranks(measure_rounds, 2, name, timeout_s=1500)[0]
        ratios = sorted(watched / bare for bare, watched in rounds)
        bare = statistics.median(bare for bare, _ in rounds)
        print(
            f"{name}: a step takes {bare:.2f} ms of processor time bare; watched ×{statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f}; target {target})",
            flush=True,
        )
    taken = run_on_ranks(measure_memory, 2, timeout_s=200)[0]
    print(f"memory for {TENSORS} parameter tensors: {taken / 1e6:.2f} MB (target {5 + TENSORS * 16 / 1e6:.2f} MB)")
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "empty.py"
        script.write_text("import torch\n")
        pairs = [
            (measure_start([str(script)]), measure_start(["-m", "ddpcall", "watch", str(script)]))
            for _ in range(STARTS)
        ]
    differences = [watched - bare for bare, watched in pairs]
    print(f"start-up: {statistics.median(differences):.2f} s beyond `import torch` (target 0.5 s)")


if __name__ == "__main__":
    main()
