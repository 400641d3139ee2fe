"""The forward_bypass grid in one torchrun, against one torchrun for each of its trials."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "launch" / "train.py"
PATHS = ("call", "forward", "inner_call", "inner_forward", "inner_method", "submodules", "functional")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]


def time_run(*overrides: str) -> float:
    """Return the seconds one torchrun takes, interpreter start included."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        command = [*LAUNCH, *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Measure twice, alternating, and print."""
    ratios = []
    for _ in range(2):
        together = time_run("experiment=forward_bypass")
        apart = sum(time_run("experiment=forward_bypass", f"grid.path=[{path}]") for path in PATHS)
        ratios.append(apart / together)
        print(
            f"one torchrun {together:.1f} s, one for each of {len(PATHS)} trials {apart:.1f} s: ×{ratios[-1]:.1f}"
        )
    print(f"the grid in one torchrun is ×{sum(ratios) / len(ratios):.1f} faster (target: at least 4)")


if __name__ == "__main__":
    main()
