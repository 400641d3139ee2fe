"""Where a process stands, as the variables of torchrun, srun and mpirun say."""

import os
import socket
import subprocess
import sys

import pytest

from ddpcall.launch_environment import read_place
from ddpcall.watch.launch import current_launch, is_running, name_process
from tests.ranks.lab_process import clean_environment

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name in TORCHRUN or name.startswith(("SLURM_", "OMPI_", "TORCHELASTIC_", "MASTER_")):
            monkeypatch.delenv(name)


def set_all(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN, MPIRUN], ids=["torchrun", "srun", "mpirun"])
def test_rank_size_and_host_are_read_whoever_launches(monkeypatch, variables):
    set_all(monkeypatch, variables)
    launch = current_launch()
    assert (launch.rank, launch.num_ranks) == (3, 4)
    assert launch.on_host == {"0/2", "0/3"}
    assert launch.everywhere == {"0/0", "0/1", "0/2", "0/3"}


def test_torchruns_variables_come_before_those_of_the_job_it_runs_in(monkeypatch):
    set_all(monkeypatch, {**SRUN, **TORCHRUN, "RANK": "0"})
    assert read_place().rank == 0


def test_one_process_of_a_slurm_batch_script_is_one_process(monkeypatch):
    set_all(monkeypatch, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"})
    assert (current_launch().num_ranks, current_launch().on_host) == (1, {"0/0"})


def test_a_process_is_told_from_a_later_one_of_the_same_number():
    name = name_process(os.getpid())
    assert is_running(name)
    assert not is_running(name + "0")
    child = os.fork()
    if child == 0:
        os._exit(0)
    name = name_process(child)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not is_running(name), "a zombie has ended"
    os.waitpid(child, 0)
    assert not is_running(name)


BYPASSES = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
ddp = DistributedDataParallel(torch.nn.Linear(4, 2))
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
torch.manual_seed(dist.get_rank())
for _ in range(3):
    ddp.module(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
dist.destroy_process_group()
"""
# What stands between the launcher and each rank: a shell; a Python program, or a terminal of its own.
BETWEEN = {
    "shell": ["sh", "-c", '"$@"; exit $?', "sh"],
    "program": [sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"],
}


@pytest.mark.parametrize("between", BETWEEN)
def test_ranks_with_a_parent_each_are_not_green(tmp_path, between):
    """Each waited for the other to report, in a file of its own, and both left with 0 and without a word."""
    script = tmp_path / "train.py"
    script.write_text(BYPASSES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [*BETWEEN[between], sys.executable, "-m", "ddpcall", "watch", script],
            env=clean_environment(**place, RANK=rank, LOCAL_RANK=rank, OMP_NUM_THREADS="1"),
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    answers = ["1 error" in text for text in said]
    if between == "shell":
        assert sorted(answers) == [False, True], said
        assert "ranks 0, 1" in said[answers.index(True)]
    else:
        assert answers == [True, True], said
    assert [process.returncode for process in ranks] == [int(answer) for answer in answers]
