"""Grade a script: run it on ranks under witness and watch, judge what was seen, make the gradebook's entry."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ddpcall
from ddpcall.lab.launcher_variables import is_of_a_launch
from ddpcall.teach.criteria import Case, Score, judge_all
from ddpcall.teach.exercises import Exercise
from ddpcall.teach.processes import Ended, run_limited
from ddpcall.teach.testimony import Hearing, Testimony

SCHEMA = 1
LONGEST_SOCKET_PATH = 100  # bytes; the system's limit is 108, on macOS 104
SOCKET, FINDINGS = "DDPCALL_GRADE_SOCKET", "DDPCALL_GRADE_FINDINGS"


@dataclass(frozen=True)
class Report:
    """One graded script.

    Attributes:
        exercise: The exercise.
        script: What was graded.
        sha256: The script's digest: which version it was.
        ranks: How many ranks it ran on.
        limit_s: The time limit, in seconds.
        ended: How the launch ended.
        scores: One for each criterion.
        findings: What the watch found; None where that cannot be told.
        graded_at: When, in UTC.
    """

    exercise: Exercise
    script: Path
    sha256: str
    ranks: int
    limit_s: float
    ended: Ended
    scores: list[Score]
    findings: list[dict[str, Any]] | None
    graded_at: str

    @property
    def points(self) -> int:
        """What the script earned, of 100."""
        return sum(score.points for score in self.scores)

    @property
    def of(self) -> int:
        """What there is to earn."""
        return sum(score.criterion.points for score in self.scores)

    @property
    def is_full(self) -> bool:
        """Whether no point is missing."""
        return self.points == self.of

    def record(self) -> dict[str, Any]:
        """Return the gradebook's record (docs/teaching.md)."""
        import torch

        return {
            "schema": SCHEMA,
            "exercise": self.exercise.name,
            "script": str(self.script),
            "sha256": self.sha256,
            "graded_at": self.graded_at,
            "points": self.points,
            "of": self.of,
            "outcome": "full marks" if self.is_full else "points missing",
            "criteria": [_score_record(score) for score in self.scores],
            "findings": self.findings,
            "ranks": self.ranks,
            "time_limit_s": self.limit_s,
            "seconds": round(self.ended.seconds, 2),
            "timed_out": self.ended.timed_out,
            "processes_left_behind": self.ended.left_behind,
            "output": self.ended.output,
            "environment": {
                "ddpcall": ddpcall.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


def _score_record(score: Score) -> dict[str, Any]:
    return {
        "key": score.criterion.key,
        "title": score.criterion.title,
        "points": score.points,
        "of": score.criterion.points,
        "passed": score.judgement.passed,
        "sentence": score.judgement.sentence,
        "withheld_by": list(score.withheld_by),
    }


def grade(exercise: Exercise, script: Path, ranks: int, limit_s: float) -> Report:
    """Run a script and judge it. The script runs as this user, without a sandbox.

    Args:
        exercise: What it is a solution of.
        script: The file.
        ranks: How many processes, 2 or more.
        limit_s: Seconds after which it is killed, with everything it started.

    Raises:
        OSError: The script cannot be read.
    """
    source = script.read_bytes()
    with tempfile.TemporaryDirectory(
        prefix="ddpcall-", dir=_short_directory(), ignore_cleanup_errors=True
    ) as name:
        ended, testimonies, findings = _run(script.absolute(), ranks, limit_s, Path(name))
    from ddpcall.teach.reference import Reference

    case = Case(
        Reference(exercise.script),
        ranks,
        exercise.min_steps,
        exercise.min_accuracy,
        ended,
        testimonies,
        findings,
        list(find_faults(source)),
    )
    return Report(
        exercise,
        script,
        hashlib.sha256(source).hexdigest(),
        ranks,
        limit_s,
        ended,
        judge_all(exercise.criteria, case),
        findings,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _short_directory() -> str | None:
    """Return where to make the run's directory: its socket's path must not be too long."""
    usual = tempfile.gettempdir()
    return usual if len(usual.encode()) < LONGEST_SOCKET_PATH - 40 else "/tmp"


def _run(
    script: Path, ranks: int, limit_s: float, directory: Path
) -> tuple[Ended, list[Testimony], list[dict[str, Any]] | None]:
    work, scratch, findings = directory / "work", directory / "tmp", directory / "findings" / "watch.json"
    for path in (work, scratch, findings.parent):
        path.mkdir()
    hearing = Hearing(directory / "line", ranks)
    kept = {name: value for name, value in os.environ.items() if not is_of_a_launch(name)}
    environment = {
        **kept,
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(scratch),
        SOCKET: str(directory / "line"),
        FINDINGS: str(findings),
    }
    try:
        ended = run_limited(launch_command(script, ranks), work, environment, limit_s)
    finally:
        testimonies = hearing.close()
    return ended, testimonies, _read_findings(findings)


def launch_command(script: Path, ranks: int) -> list[str]:
    """Return the command that runs a script on ranks, each under `ddpcall.teach.rank`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, "-m", "ddpcall.teach.rank", str(script)]


def _read_findings(path: Path) -> list[dict[str, Any]] | None:
    try:
        found = json.loads(path.read_text())["findings"]
        return [{**one, "severity": str(one["severity"]), "line": int(one["line"])} for one in found]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_faults(source: bytes) -> Iterator[str]:
    """Yield what a script's text does that no solution needs: laying hands on ddpcall.

    Blind to: names put together while it runs. What is changed then, the witness sees at the end.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # it will not run either, and that is said elsewhere
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
        if any(name.split(".")[0] == "ddpcall" for name in names):
            yield f"Line {getattr(node, 'lineno', 0)} reaches for ddpcall, which is grading it: take that out."
            return
