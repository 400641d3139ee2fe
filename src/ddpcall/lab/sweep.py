"""The end of a sweep: one table of all jobs, and one exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.text import Text

from ddpcall.lab.errors import EXIT_FAILED, EXIT_OK
from ddpcall.lab.run_directory import RunDirectory
from ddpcall.lab.runs import differing_overrides, list_jobs

exit_codes: list[int] = []  # of the sweeps of this process: a launcher plugin runs jobs in processes of its own


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
    from ddpcall.lab.result_table import fit_tables

    header = ["job", "overrides", "wrapper × path", "outcome", "gradients", "mixing", "test accuracy\nby rank"]
    header += ["distance from\nsynced run"]
    overrides = differing_overrides([read_overrides(job) for job in jobs])
    rows = [
        [job.name, Text(own), *_describe_trial(summary, trial)]
        for job, own, summary in zip(jobs, overrides, summaries, strict=True)
        for trial in summary.get("trials") or [{}]  # a job that failed at once has a row too
    ]
    console = open_console()
    for table in fit_tables(console, header, rows, 2, title=f"sweep of {len(jobs)} jobs"):
        console.print(table)
    command = f"ddpcall report {shorten_path(directory)}"
    console.print(f"side by side: {command}", highlight=False, soft_wrap=True, markup=False)


def _describe_trial(summary: dict[str, Any], trial: dict[str, Any]) -> list[str]:
    from ddpcall.lab.result_table import color_word

    outcome = str(summary.get("outcome", "unknown"))
    if not trial:
        return ["-", outcome, "-", "-", "-", "-"]
    words = [color_word(name, trial["verdicts"][name]) for name in ("gradients", "mixing")]
    consequence = trial["consequence"] or {}
    accuracy = " ".join(f"{one:.1%}" for one in (consequence.get("test_accuracy") or [])[:4])
    distance = consequence.get("distance")
    return [
        f"{trial['wrapper']} × {trial['path']}",
        outcome,
        *words,
        accuracy or "-",
        f"{max(map(float, distance)):.2g}" if distance else "-",
    ]


def read_overrides(job: Path) -> list[str]:
    """Return the command line's overrides of one job; empty where Hydra's record of them is missing."""
    try:
        found = yaml.safe_load((job / ".hydra" / "overrides.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return []
    return list(map(str, found or []))
