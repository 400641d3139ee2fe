"""The exchange with up to 10,000 simulated ranks on one store: what a check costs a rank, and the comparing one.

The ranks are driven one after the other from one process, over 64 connections to a TCPStore in another.
Sizes alternate (10, 100, 1,000, 10,000, 10, 100 …); figures are medians over the rounds. Bytes are those
of keys and values, both ways. A rank's µs are those its thread spends on all its requests of one check,
replies awaited; the comparing rank's ms go from its first request of the comparison to its last. "gradients"
are those of a measured step: digests, and sketches of as many groups of parameters as are ever told apart, which
are added up over the ranks.
"""

import statistics
import subprocess
import sys
import time
import tracemalloc
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.distributed import PrefixStore, TCPStore

from ddpcall.mixing.sums import MAX_GROUPS, NUM_BUCKETS
from ddpcall.watch.compare.store_protocol import RankStore, State
from ddpcall.watch.compare.vitals import GRADIENTS, PARTS, REPLICAS, TARGETS, Vitals

SIZES = (10, 100, 1_000, 10_000)
ROUNDS = 5
NUM_CONNECTIONS = 64
SERVER = """
import sys
from torch.distributed import TCPStore
server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(server.port, flush=True)
sys.stdin.read()
"""


class Meter:
    """Counts requests, bytes and seconds of the requests that pass through."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.requests, self.num_bytes, self.seconds = 0, 0, 0.0

    def __getattr__(self, name: str) -> Any:
        request = getattr(self._store, name)

        def metered(*args: Any) -> Any:
            began = time.perf_counter()
            reply = request(*args)
            self.seconds += time.perf_counter() - began
            self.requests += 1
            self.num_bytes += sum(len(arg if isinstance(arg, bytes) else str(arg)) for arg in args)
            self.num_bytes += len(reply) if isinstance(reply, bytes) else 8
            return reply

        return metered


@dataclass
class Cost:
    """What one check cost. A rank's figures are means over the ranks; `most` is that of the busiest."""

    requests: float
    most: int
    num_bytes: float
    microseconds: float
    compare_requests: int
    compare_bytes: int
    compare_ms: float
    compare_kb: float


def make_vitals(step: int, rank: int, case: str) -> Vitals:
    """Return healthy vitals: all equal but batch and generator. One rank, or half of them, may differ."""
    if case == "gradients":
        parts = dict.fromkeys(("layout", "used", "weights before", "weights after"), 0x1234567890ABCDEF)
        sums = np.full(MAX_GROUPS * (NUM_BUCKETS + 1) + 1, rank, np.float32)
        return Vitals(step, parts | {TARGETS: rank * 2**40}, kind=GRADIENTS, sums=sums)
    parts = dict.fromkeys(PARTS, 0x1234567890ABCDEF) | {"batch": rank * 2**40, "rng": rank * 2**41}
    if (case == "one differs" and rank == 7) or (case == "half differ" and rank % 2):
        parts["parameters"] = 3
    return Vitals(step, parts)


def check(ranks: list[RankStore], meter: Meter, step: int, case: str) -> Cost:
    """Let all ranks publish one step, compare it, and let all delete what they left."""
    requests, num_bytes, seconds = [], [], []
    kind = make_vitals(step, 0, case).kind
    for rank, each in enumerate(ranks):
        if case == "one missing" and rank == 7:
            continue
        meter.reset()
        each.read_state()
        each.post(make_vitals(step, rank, case))
        each.delete_created({kind: step - 1})
        requests.append(meter.requests)
        num_bytes.append(meter.num_bytes)
        seconds.append(meter.seconds)
    meter.reset()
    began = time.perf_counter()
    ranks[0].is_complete(kind, step)
    comparison = ranks[0].compare(kind, step)
    ranks[0].write_state(State({kind: step}))
    compare_ms = (time.perf_counter() - began) * 1e3
    compare_requests, compare_bytes = meter.requests, meter.num_bytes
    tracemalloc.start()  # once more: tracing takes time
    ranks[0].compare(kind, step)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bool(comparison.missing) == (case == "one missing")
    assert bool(comparison.differing) == (case in ("one differs", "half differ"))
    assert (case == "gradients") == (comparison.sums is not None)
    return Cost(
        requests=statistics.mean(requests),
        most=max(requests),
        num_bytes=statistics.mean(num_bytes),
        microseconds=statistics.median(seconds) * 1e6,
        compare_requests=compare_requests,
        compare_bytes=compare_bytes,
        compare_ms=compare_ms,
        compare_kb=peak / 1024,
    )


def measure(stores: list[TCPStore]) -> None:
    """Measure all sizes and cases and print the medians."""
    worlds: dict[int, tuple[list[RankStore], Meter, list[PrefixStore]]] = {}
    for size in SIZES:
        prefixed = [PrefixStore(f"size{size}", store) for store in stores]
        meter: Any = Meter(prefixed[0])
        worlds[size] = ([RankStore(meter, rank, size) for rank in range(size)], meter, prefixed)
    costs: dict[tuple[int, str], list[Cost]] = {}
    step = 0
    for round_index in range(ROUNDS):
        for case in ("healthy", "one differs", "half differ", "one missing", "gradients"):
            for size, (ranks, meter, prefixed) in worlds.items():
                step += 1
                meter._store = prefixed[(round_index + step) % len(prefixed)]
                costs.setdefault((size, case), []).append(check(ranks, meter, step, case))
    for ranks, meter, prefixed in worlds.values():
        meter._store = prefixed[0]
        for each in ranks:
            each.delete_created({REPLICAS: step, GRADIENTS: step})
    columns = (
        "ranks  case         a rank: requests (most)  bytes    µs   | comparing: requests    bytes      ms      KB"
    )
    print(columns)
    for (size, case), found in sorted(costs.items(), key=lambda item: (item[0][1], item[0][0])):
        middle = {name: statistics.median(getattr(cost, name) for cost in found) for name in vars(found[0])}
        rank = "{requests:17.2f} {most:6.0f} {num_bytes:6.0f} {microseconds:6.0f}".format(**middle)
        comparing = "{compare_requests:18.0f} {compare_bytes:9.0f} {compare_ms:8.2f} {compare_kb:7.0f}"
        print(f"{size:6} {case:<12} {rank}  | {comparing.format(**middle)}")


def main() -> None:
    """Start the store, measure, report how many keys are left."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout
    assert server.stdin
    port = int(server.stdout.readline())
    try:
        stores = [
            TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False) for _ in range(NUM_CONNECTIONS)
        ]
        measure(stores)
        left = [key for key in stores[0].list_keys() if not key.endswith("/state")]
        print(f"keys left on the store, but for the states: {len(left)}")
    finally:
        server.stdin.close()
        server.wait()


if __name__ == "__main__":
    main()
