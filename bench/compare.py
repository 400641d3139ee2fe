"""What recording and comparing cost: a recorded step against a bare one, a record's size, comparing 1,000 steps.

One process, one thread. Steps of one training are recorded and not recorded in turn, by the script's own clock;
"beside" are steps of a run under the recorder that it does not keep. Printed are medians.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ddpcall.compare.files import Writer, open_run
from ddpcall.compare.record import Recorder
from ddpcall.compare.two_runs import compare_runs

STEPS = 60
COMPARED = 1000


def make_small() -> nn.Module:
    """Return a model of 2,000 parameters."""
    return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))


def make_large() -> nn.Module:
    """Return a model of 4 million parameters in eight layers."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(1000, 1000), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, 1000), *layers, nn.Linear(1000, 10))


def train(model: nn.Module, num_steps: int) -> list[float]:
    """Train on samples drawn anew and return the seconds of each step; the record of one ends in the next."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    marks = []
    for _ in range(num_steps + 1):
        inputs = torch.randn(32, 64, generator=generator)
        marks.append(time.perf_counter())
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), inputs[:, :10].argmax(dim=1)).backward()
        optimizer.step()
    return [after - before for before, after in pairwise(marks)]


def record(
    directory: Path, make: Callable[[], nn.Module], num_steps: int, wants: Callable[[int], bool]
) -> list[float]:
    """Train under the recorder and return the seconds of each step."""
    torch.manual_seed(0)
    recorder = Recorder(Writer(directory, 0, 1, "bench", None, 1000.0), wants)
    recorder.install()
    try:
        return train(make(), num_steps)
    finally:
        recorder.close()


def main() -> None:
    """Print all figures."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        for make in (make_small, make_large):
            bare = statistics.median(train(make(), STEPS)[10:])
            directory = Path(place) / make.__name__
            # Two recorded and four others in turn: a record is begun in its own step and written in the next.
            steps = record(directory, make, STEPS, lambda step: step % 6 < 2)[12:]
            kept = statistics.median(steps[1::6])
            beside = statistics.median([second for i, second in enumerate(steps) if i % 6 in (3, 4, 5)])
            size = statistics.median(path.stat().st_size for path in directory.glob("rank0/step*.npz"))
            print(
                f"{make.__name__[5:]:6} bare {bare * 1e3:.2f} ms, "
                f"recorded ×{kept / bare:.1f} ({(kept - bare) * 1e3:+.1f} ms), "
                f"beside ×{beside / bare:.2f}, {size / 1e3:.0f} kB a step"
            )
        for name in ("a", "b"):
            record(Path(place) / name, make_small, COMPARED, lambda step: step < COMPARED)
        began = time.perf_counter()
        result = compare_runs(open_run(Path(place) / "a"), open_run(Path(place) / "b"))
        print(
            f"comparing {len(result.curve)} recorded steps of the small model: {time.perf_counter() - began:.1f} s"
        )
        assert result.same, result.message


if __name__ == "__main__":
    main()
