"""Grading for tests: scripts given as text, run on forked ranks."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ddpcall.teach import grade as grading
from ddpcall.teach.exercises import EXERCISES
from ddpcall.teach.grade import Grade
from ddpcall.teach.question import find
from tests.labs import quick_launch

ROOT = Path(__file__).parents[2]
LIMIT_S = 120.0


@pytest.fixture(scope="session")
def forked_ranks() -> Iterator[Path]:
    """Start the process that graded ranks are forked from; yields its socket."""
    path = Path(tempfile.mkdtemp(prefix="labs-", dir="/tmp")) / "socket"  # a socket's path must be short
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.labs.quick_launch", str(path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    yield path
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    shutil.rmtree(path.parent)


@pytest.fixture
def grade_text(forked_ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Grade]:
    """Grade a script's text for an exercise: `grade_text(name, text, ranks=2)`."""

    def launch(script: Path, ranks: int) -> list[str]:
        return [sys.executable, quick_launch.__file__, str(forked_ranks), str(ranks), str(script)]

    monkeypatch.setattr(grading, "launch_command", launch)

    def grade(name: str, text: str, ranks: int = 2) -> Grade:
        script = tmp_path / "mine.py"
        script.write_text(text)
        return grading.grade(find(name, EXERCISES, "exercise"), script, ranks, LIMIT_S)

    return grade
