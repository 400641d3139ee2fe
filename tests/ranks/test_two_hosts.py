"""Two hosts as network namespaces: another address and another name each, and a cable that can be pulled."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks.lab_process import SCRIPT, clean_environment
from tests.ranks.processes import processes_in
from tests.ranks.test_engines import BYPASS, bug_line

WAIT_S = 240.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Hosts:
    """Two hosts on one cable."""

    def __init__(self) -> None:
        self.names = [f"ddpcall{os.getpid()}{number}" for number in (0, 1)]
        self.links = [f"dc{os.getpid() % 10**6}{number}" for number in (0, 1)]
        self.started: list[subprocess.Popen[str]] = []
        self.deadline = time.monotonic() + WAIT_S

    def connect(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for number, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def pull_cable(self) -> None:
        ip("-n", self.names[1], "link", "set", self.links[1], "down")

    def start(self, number: int, directory: Path, *command: str) -> None:
        """Start torchrun with one rank on a host, under a hostname of its own."""
        torchrun = (
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400", "--rdzv-id=hosts"),
            *(f"--rdzv-conf=is_host={1 - number}", f"--local-addr=10.77.0.{number + 1}"),
        )
        named = ("unshare", "--uts", "sh", "-c", f'hostname host{number} && exec "$@"', "sh")
        self.started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", self.names[number], *named, *torchrun, *command],
                cwd=directory,
                env=clean_environment(GLOO_SOCKET_IFNAME=self.links[number], OMP_NUM_THREADS="1"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )

    def finish(self) -> tuple[list[int], str]:
        """Wait for both; return their exit codes, and what they said."""
        said = [process.communicate(timeout=WAIT_S)[0] for process in self.started]
        return [process.returncode for process in self.started], "".join(said)

    def disconnect(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two connected hosts; skipped where this process may not make them."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("two network namespaces need root, ip and unshare")
    made = Hosts()
    try:
        made.connect()
    except subprocess.CalledProcessError as error:
        made.disconnect()
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield made
    made.disconnect()


def wait_for(path: Path, hosts: Hosts) -> None:
    while not path.exists():
        assert all(process.poll() is None for process in hosts.started), hosts.finish()
        time.sleep(0.05)


LAB = (str(SCRIPT), "steps=5", "tensorboard=false", "report=false", "hydra.run.dir=run")


def test_the_lab_runs_on_two_hosts_of_which_one_is_late(hosts, tmp_path):
    hosts.start(0, tmp_path, *LAB)
    pid = hosts.started[0].pid
    # Late: the first one's agent listens and waits.
    while not listens(hosts.names[0]):
        assert hosts.started[0].poll() is None, (pid, hosts.finish())
        time.sleep(0.05)
    hosts.start(1, tmp_path, *LAB)
    codes, said = hosts.finish()
    assert codes == [0, 0], said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["outcome"], summary["environment"]["world_size"]) == ("ok", 2)
    assert summary["trials"][0]["verdicts"]["gradients"] == "synced"


def listens(name: str) -> bool:
    """Say whether the rendezvous is open on a host: port 29400 is 72D8 in the kernel's table, 0A is listening."""
    tables = ("/proc/net/tcp", "/proc/net/tcp6")
    done = subprocess.run(
        ["ip", "netns", "exec", name, "cat", *tables], capture_output=True, text=True, check=True
    )
    return any(":72D8 " in line and " 0A " in line for line in done.stdout.splitlines())


def test_the_watch_finds_on_two_hosts_what_it_finds_on_one(hosts, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("\n".join(line.removeprefix("    ") for line in BYPASS.splitlines()[1:]) + "\n")
    for number in (0, 1):
        hosts.start(number, tmp_path, "-m", "ddpcall", "watch", "train.py")
    codes, said = hosts.finish()
    assert all(codes), said
    assert f"train.py:{bug_line() - 1}" in said


def test_a_host_that_is_cut_off_in_mid_run_is_named_and_no_rank_hangs(hosts, tmp_path):
    endless = [*LAB, "trial_timeout_s=10"]
    endless[1] = "steps=200000"
    for number in (0, 1):
        hosts.start(number, tmp_path, *endless)
    wait_for(tmp_path / "run" / "summary.json", hosts)
    hosts.pull_cable()
    said = hosts.started[0].communicate(timeout=WAIT_S)[0]
    assert hosts.started[0].returncode != 0, said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["outcome"], summary["first_failing_rank"]) in (("hung", 1), ("rank lost", 1)), summary
    # The agent on the host that was cut off may wait as long as torch lets it; its rank does not.
    while any("train.py" in line and "torch.distributed.run" not in line for line in processes_in(tmp_path)):
        assert time.monotonic() < hosts.deadline
        time.sleep(0.1)
