"""What a trivial two-rank test costs: through the pool, and the other ways to run one.

    python -m bench.ranks_pool

Every way runs the same body: join a gloo group, all_reduce one number, check it. The slow ways run a few times
and their medians are taken; all figures come from one machine in one go, so read the ratios.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NUM_POOLED = 100
NUM_CONTINUOUS = 20
NUM_SLOW = 5

BODY = "t = torch.ones(1); dist.all_reduce(t); assert t.item() == 2"
PYTEST = f"""
import pytest, torch, torch.distributed as dist

@pytest.mark.ranks(2)
@pytest.mark.parametrize("index", range({NUM_POOLED}))
def test_trivial(rank, index):
    {BODY}
"""
TORCHRUN = f"""
import torch, torch.distributed as dist

dist.init_process_group("gloo")
{BODY}
dist.destroy_process_group()
"""
UNITTEST_TIMES = """
import sys, time, unittest

class Result(unittest.TextTestResult):
    def startTest(self, test):
        self.started_s = time.perf_counter()
        super().startTest(test)

    def stopTest(self, test):
        print("TEST_MS", 1e3 * (time.perf_counter() - self.started_s))
        super().stopTest(test)

def main():
    unittest.main(testRunner=unittest.TextTestRunner(resultclass=Result))
"""
# torch's test classes import this package for a base class, and it is not among torch's requirements.
EXPECTTEST = "from unittest import TestCase"
MULTI_PROCESS = f"""
import torch, torch.distributed as dist
from torch.testing._internal.common_distributed import MultiProcessTestCase
import unittest_times

class Trivial(MultiProcessTestCase):
    world_size = 2

    def setUp(self):
        super().setUp()
        self._spawn_processes()

    def check(self):
        dist.init_process_group(
            "gloo", store=dist.FileStore(self.file_name, 2), rank=self.rank, world_size=2
        )
        {BODY}
        dist.destroy_process_group()

for index in range({NUM_SLOW}):
    setattr(Trivial, f"test_{{index}}", lambda self: self.check())
for name in [name for name in dir(Trivial) if name.startswith("test_")]:
    getattr(Trivial, name).__name__ = name

if __name__ == "__main__":
    unittest_times.main()
"""
CONTINUOUS = f"""
import torch, torch.distributed as dist
from torch.testing._internal.common_distributed import MultiProcContinuousTest
import unittest_times

class Trivial(MultiProcContinuousTest):
    world_size = 2

    @classmethod
    def backend_str(cls):
        return "gloo"

    @classmethod
    def device_type(cls):
        return "cpu"

    def check(self):
        {BODY}

for index in range({NUM_CONTINUOUS}):
    setattr(Trivial, f"test_{{index:02}}", lambda self: self.check())
for name in [name for name in dir(Trivial) if name.startswith("test_")]:
    getattr(Trivial, name).__name__ = name

if __name__ == "__main__":
    unittest_times.main()
"""


def run_timed(directory: Path, *command: str) -> tuple[float, str]:
    """Run a command to its end; returns its wall time in ms and its output."""
    started_s = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=directory, text=True, capture_output=True, check=False)
    elapsed_ms = 1e3 * (time.perf_counter() - started_s)
    if done.returncode != 0:
        raise RuntimeError(f"{command} failed:\n{done.stdout}\n{done.stderr}")
    return elapsed_ms, done.stdout


def measure_pool(directory: Path) -> tuple[float, list[float]]:
    """Returns the wall time of the whole pytest run in ms and each test's, process group included."""
    (directory / "test_trivial.py").write_text(PYTEST)
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--ranks-report", "test_trivial.py")
    total_ms, output = run_timed(directory, *command)
    return total_ms, [float(found) for found in re.findall(r"([\d.]+) ms  ranks\(2\)", output)]


def measure_torchrun(directory: Path) -> list[float]:
    (directory / "trivial.py").write_text(TORCHRUN)
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "trivial.py")
    return [run_timed(directory, *command)[0] for _ in range(NUM_SLOW)]


def measure_unittest(directory: Path, name: str, text: str) -> list[float]:
    (directory / "unittest_times.py").write_text(UNITTEST_TIMES)
    (directory / "expecttest.py").write_text(EXPECTTEST)
    (directory / f"{name}.py").write_text(text)
    _, output = run_timed(directory, f"{name}.py")
    return [float(found) for found in re.findall(r"TEST_MS ([\d.]+)", output)]


def print_row(name: str, per_test_ms: float, pool_ms: float, note: str) -> None:
    print(f"{name:34}{per_test_ms:10.1f} ms{per_test_ms / pool_ms:9.1f} x   {note}")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        total_ms, tests_ms = measure_pool(directory)
        torchrun_ms = statistics.median(measure_torchrun(directory))
        spawned_ms = statistics.median(measure_unittest(directory, "multi_process", MULTI_PROCESS))
        continuous_ms = statistics.median(measure_unittest(directory, "continuous", CONTINUOUS))
    pool_ms = statistics.median(tests_ms)
    print(f"{'one two-rank test':34}{'median':>13}{'ratio':>11}")
    print_row("the pool, a group per test", pool_ms, pool_ms, f"{len(tests_ms)} tests")
    print_row("torchrun per test", torchrun_ms, pool_ms, f"{NUM_SLOW} runs")
    print_row("MultiProcessTestCase", spawned_ms, pool_ms, f"{NUM_SLOW} tests")
    print_row("MultiProcContinuousTest", continuous_ms, pool_ms, f"{NUM_CONTINUOUS} tests, one group for all")
    print(
        f"whole run of {NUM_POOLED} tests, pytest's and the pool's start included: {total_ms / 1e3:.1f} s; "
        f"{NUM_POOLED} torchruns would take {torchrun_ms * NUM_POOLED / 1e3:.0f} s "
        f"({torchrun_ms * NUM_POOLED / total_ms:.0f} x)"
    )


if __name__ == "__main__":
    main()
