"""Digests of a model's memory against this machine's read bandwidth, one thread.

Read, digest, read, digest …: each figure is the median over the rounds of a digest's speed divided by the speed of
the read next to it, so that a busy machine slows both. The read is the faster of numpy's OR over 64-bit words and
torch's sum of them, over the large tensor. Before each measurement the other tensors have passed through the
caches. Seconds are the thread's processor time: what other processes take of the core does not count.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from ddpcall.replicas import StateDigester
from ddpcall.watch.compare.vitals import VitalsTaker

ROUNDS = 21
LARGE_BYTES = 512 * 2**20
NUM_SMALL, SMALL_BYTES = 10_000, 4096


def measure_speed(action: Callable[[], object], num_bytes: int) -> float:
    """Return GB/s of one run."""
    began = time.thread_time()
    action()
    return num_bytes / (time.thread_time() - began) / 1e9


def make_small_model() -> nn.Module:
    """Return a model of many small parameters, 100 to a module."""
    model = nn.Module()
    for index in range(NUM_SMALL // 100):
        parameters = nn.ParameterList([torch.randn(SMALL_BYTES // 4) for _ in range(100)])
        model.add_module(f"block{index}", parameters)
    return model


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    large = torch.randn(LARGE_BYTES // 4)
    as_words, as_integers = large.numpy().view(np.uint64), large.view(torch.int64)
    model = make_small_model()
    small_bytes = NUM_SMALL * SMALL_BYTES
    large_digester = StateDigester({"large": large})
    small_digester = StateDigester(dict(model.named_parameters()))
    taker = VitalsTaker(model, torch.optim.SGD(model.parameters(), lr=0.1))
    subjects: dict[str, tuple[Callable[[], object], int, str]] = {
        "one large tensor": (large_digester.digest, LARGE_BYTES, "target 0.85"),
        "10,000 tensors of 4 KB, digest over kept views": (
            small_digester._stream_views,
            small_bytes,
            "target 0.60",
        ),
        "10,000 tensors of 4 KB, each one's address checked": (small_digester.digest, small_bytes, ""),
        "10,000 tensors of 4 KB, whole vitals": (lambda: taker.take(1), small_bytes, ""),
    }
    ratios: dict[str, list[float]] = {name: [] for name in subjects}
    reads: list[float] = []
    for _ in range(ROUNDS):
        for name, (action, num_bytes, _) in subjects.items():
            read = max(
                measure_speed(lambda: np.bitwise_or.reduce(as_words), LARGE_BYTES),
                measure_speed(as_integers.sum, LARGE_BYTES),
            )
            reads.append(read)
            ratios[name].append(measure_speed(action, num_bytes) / read)
    print(f"read bandwidth, one thread: {statistics.median(reads):.1f} GB/s ({min(reads):.1f}–{max(reads):.1f})")
    for name, (_, _, target) in subjects.items():
        values = sorted(ratios[name])
        spread = f"{values[0]:.2f}–{values[-1]:.2f}"
        print(f"{name}: {statistics.median(values):.2f} of it ({spread}) {target}".rstrip())
    began = time.perf_counter()
    StateDigester(dict(model.named_parameters()))
    print(f"start for 10,000 tensors: {(time.perf_counter() - began) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
