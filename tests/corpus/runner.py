"""Launches corpus scripts: torchrun for several ranks, bounded in time, output kept."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Run:
    """How a launch ended. `exit_code` is -1 when it ran into the time limit."""

    exit_code: int
    output: str
    seconds: float


def run_on_ranks(
    ranks: int, arguments: Sequence[str], variables: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S
) -> Run:
    """Runs `arguments` (a script, or `-m module …`) under torchrun; under plain python for one rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path()} | dict(variables or {})
    return run_bounded([sys.executable, *launcher, *arguments], environment, timeout_s)


def run_bounded(
    command: Sequence[str], environment: Mapping[str, str], timeout_s: float, directory: Path = ROOT
) -> Run:
    """Runs a command in a session of its own and ends all of that session when the time is up."""
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
        return Run(process.returncode, output, time.monotonic() - started)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=40.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        return Run(-1, output, time.monotonic() - started)


def search_path() -> str:
    """The caller's PYTHONPATH before the repository's root, so that another build of ddpcall can be scored."""
    inherited = os.environ.get("PYTHONPATH", "")
    return f"{inherited}{os.pathsep}{ROOT}" if inherited else str(ROOT)
