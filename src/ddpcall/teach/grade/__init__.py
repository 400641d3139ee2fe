"""Grade a script: run it on ranks under observer and watch, judge what was observed, make the record."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpcall.launch_environment import is_of_a_launch
from ddpcall.teach.grade.criteria import answer_all
from ddpcall.teach.grade.graded_run import GradedRun
from ddpcall.teach.grade.observations import FACTS, FINDINGS, RankObservations, read_observations
from ddpcall.teach.grade.processes import Ended, run_limited
from ddpcall.teach.question import MET, Result

if TYPE_CHECKING:
    from ddpcall.teach.exercises import Exercise

SCHEMA = 1


@dataclass(frozen=True)
class Grade:
    """One graded script.

    Attributes:
        exercise: The exercise.
        script: What was graded.
        sha256: The script's digest: which version it was.
        limit_s: The time limit, in seconds.
        run: What was observed.
        results: One for each criterion.
    """

    exercise: Exercise
    script: Path
    sha256: str
    limit_s: float
    run: GradedRun
    results: list[Result]

    @property
    def points(self) -> int:
        """What the script earned, of 100."""
        return sum(result.points for result in self.results)

    @property
    def of(self) -> int:
        """What there is to earn."""
        return sum(result.question.points for result in self.results)

    @property
    def is_full(self) -> bool:
        """Whether no point is missing."""
        return self.points == self.of

    def record(self) -> dict[str, Any]:
        """Return the gradebook's record (docs/teaching.md)."""
        from ddpcall.teach.run import describe_environment

        ended = self.run.ended
        return {
            "schema": SCHEMA,
            "exercise": self.exercise.name,
            "script": str(self.script),
            "sha256": self.sha256,
            "graded_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "points": self.points,
            "of": self.of,
            "outcome": "full marks" if self.is_full else "points missing",
            "criteria": [
                {
                    "key": result.question.key,
                    "title": result.question.text,
                    "points": result.points,
                    "of": result.question.points,
                    "passed": result.measured == MET,
                    "sentence": result.sentence,
                    "withheld_by": list(result.withheld_by),
                }
                for result in self.results
            ],
            "findings": self.run.findings,
            "ranks": self.run.num_ranks,
            "time_limit_s": self.limit_s,
            "seconds": round(ended.seconds, 2),
            "timed_out": ended.timed_out,
            "processes_left_behind": ended.left_behind,
            "output": ended.output,
            "environment": describe_environment(),
        }


def grade(exercise: Exercise, script: Path, num_ranks: int, limit_s: float) -> Grade:
    """Run a script and judge it. The script runs as this user, without a sandbox.

    Args:
        exercise: What it is a solution of.
        script: The file.
        num_ranks: How many processes, 2 or more.
        limit_s: Seconds after which it is killed, with everything it started.

    Raises:
        OSError: The script cannot be read.
    """
    from ddpcall.teach.grade.reference import Reference

    source = script.read_bytes()
    reference, steps, accuracy = Reference(exercise.script), exercise.min_steps, exercise.min_accuracy
    with tempfile.TemporaryDirectory(prefix="ddpcall-", ignore_cleanup_errors=True) as name:
        observed = _launch(script.absolute(), num_ranks, limit_s, Path(name))
    run = GradedRun(reference, num_ranks, steps, accuracy, *observed, list(find_faults(source)))
    digest = hashlib.sha256(source).hexdigest()
    return Grade(exercise, script, digest, limit_s, run, answer_all(exercise.criteria, run))


def _launch(
    script: Path, num_ranks: int, limit_s: float, directory: Path
) -> tuple[Ended, list[RankObservations], list[dict[str, Any]] | None]:
    work, scratch, facts, findings = (directory / name for name in ("work", "tmp", "facts", "findings"))
    for path in (work, scratch, facts, findings):
        path.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if not is_of_a_launch(name)},
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(scratch),
        FACTS: str(facts),
        FINDINGS: str(findings / "watch.json"),
    }
    ended = run_limited(launch_command(script, num_ranks), work, environment, limit_s)
    return ended, read_observations(facts, num_ranks), _read_findings(findings / "watch.json")


def launch_command(script: Path, num_ranks: int) -> list[str]:
    """Return the command that runs a script on ranks, each under `ddpcall.teach.grade.rank`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, *torchrun, "-m", "ddpcall.teach.grade.rank", str(script)]


def _read_findings(path: Path) -> list[dict[str, Any]] | None:
    try:
        found = json.loads(path.read_text())["findings"]
        return [{**one, "severity": str(one["severity"]), "line": int(one["line"])} for one in found]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_faults(source: bytes) -> Iterator[str]:
    """Yield what a script's text does that no solution needs: laying hands on ddpcall.

    Blind to: names put together while it runs. What is changed then, the observer sees at the end.
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
