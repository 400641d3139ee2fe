"""Start the lab as a user does, in a process of its own, and read what it left."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "train.py"
TIMEOUT_S = 480  # the whole truth table, on a machine that does other things too


@dataclass(frozen=True)
class Run:
    """A finished run of the lab."""

    code: int
    out: str
    err: str
    directory: Path

    def summary(self) -> dict[str, Any]:
        """Return summary.json of the only run directory."""
        return json.loads(self.only_run().joinpath("summary.json").read_text())

    def only_run(self) -> Path:
        """Return the run directory; there must be exactly one."""
        (path,) = self.directory.glob("runs/*/*")
        return path

    def records(self, name: str) -> list[dict[str, Any]]:
        """Return the records of a JSONL file."""
        return [json.loads(line) for line in self.only_run().joinpath(name).read_text().splitlines()]


def clean_environment(**extra: str) -> dict[str, str]:
    """Return the environment without what an outer launcher may have put there."""
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
    )
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "COLUMNS": "200", **extra}


def torchrun(num_ranks: int) -> list[str]:
    """Return the command line of torchrun for local ranks."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]


def run_lab(directory: Path, *overrides: str, ranks: int = 0, environment: dict[str, str] | None = None) -> Run:
    """Run launch/train.py in a directory: under torchrun with `ranks` processes, plainly for 0."""
    launcher = torchrun(ranks) if ranks else [sys.executable]
    finished = subprocess.run(
        [*launcher, str(SCRIPT), *overrides],
        cwd=directory,
        env=clean_environment(**(environment or {})),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return Run(finished.returncode, finished.stdout, finished.stderr, directory)
