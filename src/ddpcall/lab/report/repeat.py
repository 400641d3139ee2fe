"""The command that repeats a run."""

from __future__ import annotations

import shlex

from ddpcall.lab.records import RunRecord


def repeat_command(run: RunRecord) -> str:
    """Return one line for a shell; empty where Hydra's record of the command line is missing."""
    if run.overrides is None or run.environment is None:
        return ""
    ranks = run.environment.world_size
    start = f"torchrun --standalone --nproc-per-node {ranks} -m ddpcall" if ranks > 1 else "ddpcall"
    return f"{start} train {shlex.join([*run.search, *run.overrides])}".strip()
