"""The end of a sweep: one table of all jobs, and one exit code."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.text import Text

from ddpcall.lab.errors import EXIT_FAILED, EXIT_OK, EXIT_WRONG_USE
from ddpcall.lab.run_directory import RunDirectory
from ddpcall.lab.runs import differing_overrides, list_jobs
from ddpcall.launch_environment import read_place

COLUMNS = ("gradients", "mixing", "accuracy", "distance")
exit_codes: list[int] = []  # of the sweeps of this process: a launcher plugin runs jobs in processes of its own


class RunDirectoryCheck(Callback):
    """Hydra's callback before a run, whose directory Hydra makes with a traceback where it cannot."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at the sweep's directory, below which each job has its own."""
        self._check(Path(config.hydra.sweep.dir).absolute())

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Look at the run's directory."""
        self._check(Path(config.hydra.run.dir).absolute())

    def _check(self, directory: Path) -> None:
        """Leave with one message where the directory cannot be made and written; rank 0 speaks."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory) as file:
                file.write(b" " * 65536)
        except OSError as error:
            if read_place().rank == 0:
                print(
                    f"ddpcall: the run directory {directory} cannot be written: {error.strerror}. Write another "
                    "hydra.run.dir",
                    file=sys.stderr,
                    flush=True,
                )
            sys.exit(EXIT_WRONG_USE)


class SweepTable(Callback):
    """Hydra's callback at the end of `--multirun`, whatever launcher ran the jobs."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table; a job that left no summary, or did not end well, fails the sweep."""
        directory = Path(config.hydra.sweep.dir).absolute()
        jobs = list_jobs(directory)
        summaries = [RunDirectory(job).read_summary() for job in jobs]
        if jobs:
            print_jobs(directory, jobs, summaries)
        well = bool(jobs) and all(summary.get("outcome") == "ok" for summary in summaries)
        exit_codes.append(EXIT_OK if well else EXIT_FAILED)


def print_jobs(directory: Path, jobs: list[Path], summaries: list[dict[str, Any]]) -> None:
    """Print one row for each trial of each job, named by the overrides in which the jobs differ."""
    from ddpcall.lab.console import open_console, shorten_path
    from ddpcall.lab.records import read_trial
    from ddpcall.lab.report.terminal import fit_tables, lay_out

    overrides = differing_overrides([read_overrides(job) for job in jobs])
    trials = [[read_trial(trial) for trial in summary.get("trials") or ()] for summary in summaries]
    header, laid_out = lay_out([trial for of_job in trials for trial in of_job], COLUMNS)
    rows = iter(laid_out)
    shown = [
        [job.name, Text(own), str(summary.get("outcome", "unknown")), *row]
        for job, own, summary, of_job in zip(jobs, overrides, summaries, trials, strict=True)
        # A job that failed at once has a row too.
        for row in ([next(rows) for _ in of_job] or [["-"] * len(header)])
    ]
    console = open_console()
    for table in fit_tables(
        console, ["job", "overrides", "outcome", *header], shown, 2, title=f"sweep of {len(jobs)} jobs"
    ):
        console.print(table)
    command = f"ddpcall report {shorten_path(directory)}"
    console.print(f"side by side: {command}", highlight=False, soft_wrap=True, markup=False)


def read_overrides(job: Path) -> list[str]:
    """Return the command line's overrides of one job; empty where Hydra's record of them is missing."""
    try:
        found = yaml.safe_load((job / ".hydra" / "overrides.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return []
    return list(map(str, found or []))
