"""Scripts on ranks that `forked_launcher` starts."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import pytest

from tests.corpus.runner import search_path
from tests.ranks.lab_process import clean_environment

ROOT = Path(__file__).parents[2]
WAIT_S = 1.5  # what the watch waits for a rank that does not answer; 15 by default
HANGING_S = 120


class ForkedLauncher:
    """The process that forks ranks on request; entered, it is started, and ended afterwards.

    Args:
        *preloaded: `lab`, where it is to have imported that too.
    """

    def __init__(self, *preloaded: str) -> None:
        self._preloaded = preloaded

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.__exit__(None, None, None)  # closes its stdin, which ends it, and waits

    def _start(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.watch.forked_launcher", *self._preloaded],
            cwd=ROOT,
            env=clean_environment(OMP_NUM_THREADS="1", PYTHONPATH=search_path()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def launch(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        """Start ranks and return how they ended; None, and a new server, where the time ran out."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        if select.select([self._server.stdout], [], [], timeout_s)[0]:
            return json.loads(self._server.stdout.readline())
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.__exit__(None, None, None)
        self._start()
        return None


class Launched:
    """How a launch ended, and what it left."""

    def __init__(self, launcher, directory, script, *arguments, options=(), afterwards=(), environment=None):
        (directory / "train.py").write_text(script)
        request = {
            "arguments": ["watch", "--json", "f.json", *options, "train.py", *arguments],
            "directory": str(directory),
            "ranks": 2,
            "wait_s": WAIT_S,
            "afterwards": afterwards,
            "environment": environment or {},
        }
        answer = launcher.launch(request, HANGING_S)
        if answer is None:
            pytest.fail(f"{arguments}: still running after {HANGING_S} s\n{(directory / 'err').read_text()}")
        self.codes, self.seconds = answer["codes"], answer["seconds"]
        self.out, self.err = (directory / "out").read_text(), (directory / "err").read_text()
        file = directory / "f.json"
        findings = json.loads(file.read_text())["findings"] if file.exists() else []
        self.found = sorted((finding["code"], finding["line"]) for finding in findings)
        self.num_ended = self.out.count("came to its end")
        self.num_said = self.err.count("ddpcall: DC101")
        self.num_lists = self.err.count("ddpcall watch: ")
