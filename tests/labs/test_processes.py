"""Commands that do their worst: they end at the limit, take their processes with them, and flood nobody."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ddpcall.teach.grade.processes import KEPT_OUTPUT_BYTES, run_limited

ENDLESS = """
import os, subprocess, sys, time
# An orphan in a session of its own, whose parent ends at once, and which forks again.
code = "import os, time; os.fork(); open(f'{os.getpid()}.pid', 'w').close(); time.sleep(1000)"
starter = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
subprocess.run([sys.executable, "-c", starter, code])
while len([name for name in os.listdir() if name.endswith(".pid")]) < 2:
    time.sleep(0.01)
open("started", "w").close()
while True:
    print("x" * 10_000)
"""


def run(code: str, directory: Path, limit_s: float):
    return run_limited([sys.executable, "-c", code], directory, dict(os.environ), limit_s)


def children() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_command_that_ends_is_reported_as_it_ended(tmp_path):
    ended = run("import sys; print('out'); print('error', file=sys.stderr); sys.exit(3)", tmp_path, 60)
    assert (ended.code, ended.timed_out, ended.left_behind) == (3, False, 0)
    assert sorted(ended.output.split()) == ["error", "out"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="orphans are adopted on Linux alone")
def test_at_the_limit_everything_is_killed_orphans_too_and_output_is_cut(tmp_path):
    before = set(children())
    started = time.monotonic()
    ended = run(ENDLESS, tmp_path, 8)
    assert time.monotonic() - started < 30
    assert (tmp_path / "started").exists()
    assert ended.timed_out
    assert 0 < len(ended.output) <= KEPT_OUTPUT_BYTES
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(pids) >= 2
    assert not any(map(is_running, pids))
    assert set(children()) <= before


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="orphans are adopted on Linux alone")
def test_what_a_command_leaves_behind_is_killed_and_counted(tmp_path):
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '1000'], start_new_session=True).pid)"
    ended = run(code, tmp_path, 60)
    assert (ended.code, ended.timed_out, ended.left_behind) == (0, False, 1)
    assert not is_running(int(ended.output))


def test_processes_that_were_there_before_are_left_alone(tmp_path):
    with subprocess.Popen(["sleep", "1000"]) as bystander:
        run("pass", tmp_path, 60)
        assert bystander.poll() is None
        bystander.kill()
