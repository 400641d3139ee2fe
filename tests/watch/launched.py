"""Scripts on ranks that `forked_launcher` starts."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ranks.lab_process import clean_environment

ROOT = Path(__file__).parents[2]
WAIT_S = 1.5  # what the watch waits for a rank that does not answer; 15 by default
HANGING_S = 120


@contextmanager
def forked_launcher() -> Iterator[subprocess.Popen[str]]:
    """Start the process that forks ranks on request; end it afterwards."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.watch.forked_launcher"],
        cwd=ROOT,
        env=clean_environment(OMP_NUM_THREADS="1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as server:
        assert server.stdin is not None
        yield server
        server.stdin.close()
        server.wait(30)


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
        launcher.stdin.write(json.dumps(request) + "\n")
        launcher.stdin.flush()
        if not select.select([launcher.stdout], [], [], HANGING_S)[0]:
            os.killpg(launcher.pid, signal.SIGKILL)
            pytest.fail(f"{arguments}: still running after {HANGING_S} s\n{(directory / 'err').read_text()}")
        answer = json.loads(launcher.stdout.readline())
        self.codes, self.seconds = answer["codes"], answer["seconds"]
        self.out, self.err = (directory / "out").read_text(), (directory / "err").read_text()
        file = directory / "f.json"
        findings = json.loads(file.read_text())["findings"] if file.exists() else []
        self.found = sorted((finding["code"], finding["line"]) for finding in findings)
        self.num_ended = self.out.count("came to its end")
        self.num_said = self.err.count("ddpcall: DC101")
        self.num_lists = self.err.count("ddpcall watch: ")
