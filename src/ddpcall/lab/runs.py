"""The runs below a directory: the latest, the jobs of a sweep, and the page that lists them all."""

from __future__ import annotations

import html
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpcall.lab.run_directory import SUMMARY, RunDirectory

RUNS = "runs"
INDEX = "index.html"
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Runs</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
td, th {{ border-bottom: 1px solid #8886; padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top }}
</style>
<h1>Runs</h1>
<table>
<tr><th>run</th><th>experiment</th><th>outcome</th><th>measured on</th><th>ended</th></tr>
{rows}
</table>
</html>
"""


def list_runs(root: Path) -> list[Path]:
    """Return the run directories below `root`, `NAME/RUN_ID` and the jobs of sweeps, the latest first."""
    found = [*root.glob(f"*/*/{SUMMARY}"), *root.glob(f"*/*/*/{SUMMARY}")]
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def list_jobs(directory: Path) -> list[Path]:
    """Return the run directories of a sweep, in order; empty where the directory is no sweep."""
    if not directory.is_dir() or (directory / SUMMARY).exists():
        return []
    jobs = [path.parent for path in directory.glob(f"*/{SUMMARY}")]
    return sorted(jobs, key=lambda path: (not path.name.isdigit(), path.name.rjust(9, "0")))


def write_index(run: Path) -> None:
    """Write the page that lists all runs, where the run lies below a directory `runs`."""
    root = next((parent for parent in run.absolute().parents if parent.name == RUNS), None)
    if root is None:
        return
    page = _PAGE.format(rows="\n".join(_row(root, path) for path in list_runs(root)))
    temporary = root / f".{INDEX}.{os.getpid()}"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(root / INDEX)


def _row(root: Path, run: Path) -> str:
    summary = RunDirectory(run).read_summary()
    name = run.relative_to(root).as_posix()
    environment: dict[str, Any] = summary.get("environment") or {}
    ranks, device, torch = (environment.get(key, "?") for key in ("world_size", "device", "torch"))
    ended = time.strftime("%Y-%m-%d %H:%M", time.localtime((run / SUMMARY).stat().st_mtime))
    facts = [summary.get("experiment", "?"), summary.get("outcome", "?")]
    facts += [f"{ranks} ranks, {device}, torch {torch}", ended]
    link = html.escape(name)
    if (run / "report.html").exists():
        link = f'<a href="{link}/report.html">{link}</a>'
    cells = [link, *(html.escape(str(fact)) for fact in facts)]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def differing_overrides(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Return of each job the overrides that not all jobs have, in one string."""
    shared = set(jobs[0]).intersection(*jobs[1:]) if jobs else set()
    return [" ".join(one for one in job if one not in shared) for job in jobs]
