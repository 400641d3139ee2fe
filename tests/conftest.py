"""What every test of the project gets: a check that it leaves no trace, and pytest runs of a user's project."""

import os
import signal
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Set for good by pytest itself, by inductor at its first import and by scikit-learn's OpenMP.
SET_BY_OTHERS = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_", "KMP_")


def pytest_configure() -> None:
    """Let children be interrupted: shells start background jobs with the signal ignored, and that is inherited."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests of each kind (folder) passed, failed or were skipped."""
    counts: dict[str, Counter[str]] = {}
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            is_result = getattr(report, "when", "") == "call" or outcome in ("error", "skipped")
            if isinstance(report, pytest.TestReport) and is_result:
                kind = report.nodeid.removeprefix("tests/").partition("/")[0]
                counts.setdefault(kind, Counter())[outcome] += 1
    terminalreporter.section("tests by kind")
    for kind, outcomes in sorted(counts.items()):
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        terminalreporter.write_line(f"{kind:10}{told}")


@pytest.fixture(autouse=True)
def environment_is_left_alone() -> Iterator[None]:
    """Fail a test that changes environment variables and does not put them back."""
    before = dict(os.environ)
    yield
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    changed = {name for name in changed if not name.startswith(SET_BY_OTHERS)}
    assert not changed, f"the test changed {sorted(changed)} in the environment"


@dataclass(frozen=True)
class UserRun:
    """One finished pytest run of a user's project.

    Attributes:
        returncode: pytest's exit status.
        output: standard output and error together.
        outcomes: by test name: passed, failed, error, skipped or xfailed.
        texts: by test name: what junit's XML says about it.
    """

    returncode: int
    output: str
    outcomes: dict[str, str]
    texts: dict[str, str]


def _read_junit(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    outcomes: dict[str, str] = {}
    texts: dict[str, str] = {}
    for case in ElementTree.parse(path).iter("testcase") if path.exists() else ():
        name, found = case.get("name", ""), {child.tag: child for child in case}
        kind = next((tag for tag in ("failure", "error", "skipped") if tag in found), "passed")
        xfailed = kind == "skipped" and found["skipped"].get("type") == "pytest.xfail"
        outcomes[name] = "xfailed" if xfailed else {"failure": "failed"}.get(kind, kind)
        texts[name] = "\n".join(f"{child.get('message') or ''}\n{child.text or ''}" for child in case)
    return outcomes, texts


def _run_user_project(directory: Path, files: dict[str, str], *args: str, timeout_s: float = 240) -> UserRun:
    for name, text in files.items():
        (directory / name).write_text(textwrap.dedent(text))
    junit = directory / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={junit}", *args]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environ["COLUMNS"] = "160"  # pytest cuts its summary lines to the width
    done = subprocess.run(
        command, cwd=directory, env=environ, text=True, capture_output=True, timeout=timeout_s, check=False
    )
    return UserRun(done.returncode, done.stdout + done.stderr, *_read_junit(junit))


@pytest.fixture(scope="session")
def run_user_project(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., UserRun]:
    """Run pytest in a process of its own on files given as {name: text}; further arguments are pytest's."""
    return lambda files, *args: _run_user_project(tmp_path_factory.mktemp("user"), files, *args)
