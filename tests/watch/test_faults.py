"""Ranks that die, stop, leave or fail under the watch: nothing hangs, no error is hidden, no finding is lost."""

import signal

import pytest

from tests.watch.launched import Launched

TRAINING = """
import atexit, gc, json, os, signal, sys, time
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

def train(mode, rank):
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for step in range(1, 6):
        x = torch.randn(3, 4)
        if step == 1 and not mode.startswith("clean"):
            outputs = model.module(x)  # the bypass
        elif mode.endswith("alone") and mode != "clean":
            outputs = model.module(x)  # alone
        else:
            outputs = model(x)
        optimizer.zero_grad()
        outputs.square().mean().backward()
        optimizer.step()
        if step == 3 and mode in FAULTS:
            FAULTS[mode](rank)

def kill(which, number=signal.SIGKILL):
    return lambda rank: rank == which and os.kill(os.getpid(), number)

def fail(which):
    def failing(rank):
        if rank == which:
            raise ValueError(f"the script's own error on rank {rank}")
    return failing

def leave(which):
    def leaving(rank):
        if rank == which:
            raise EOFError
    return leaving

FAULTS = {
    "kill_0": kill(0), "kill_1": kill(1), "fail_0": fail(0), "fail_1": fail(1),
    "stop_1_alone": kill(1, signal.SIGSTOP),
    "leave_0_alone": leave(0), "leave_1_alone": leave(1),
    "exit_text": lambda rank: rank == 1 and sys.exit("because of this"),
    "exit_6": lambda rank: rank == 1 and sys.exit(6),
    "hard_0": lambda rank: os._exit(0), "hard_3": lambda rank: os._exit(3),
    "agent_gone": lambda rank: rank == 0 and os.kill(os.getppid(), signal.SIGKILL),
    "clean_agent_gone": lambda rank: rank == 0 and os.kill(os.getppid(), signal.SIGKILL),
}

dist.init_process_group("gloo")
mode, rank = sys.argv[1], dist.get_rank()
try:
    train(mode, rank)
except EOFError:
    print(f"rank {rank} has no more data")
if not mode.endswith("alone"):
    gc.collect()
    dist.destroy_process_group()
print(f"rank {rank} came to its end")

def tidy():
    time.sleep(2.5)
    print("tidied up")

if mode == "tidy" and rank == 1:
    atexit.register(tidy)
elif mode == "tidy":
    while "0/1" not in json.load(open(".f.json.ranks"))["done"]:
        time.sleep(0.05)
"""
LINES = TRAINING.splitlines()
BYPASS = 1 + LINES.index("            outputs = model.module(x)  # the bypass")
ALONE = 1 + LINES.index("            outputs = model.module(x)  # alone")


def test_without_a_fault_one_message_and_one_list_are_printed(launcher, tmp_path):
    run = Launched(launcher, tmp_path, TRAINING, "none")
    assert (sorted(run.codes), run.num_ended) == ([0, 1], 2)
    assert (run.found, run.num_said, run.num_lists) == ([("DC101", BYPASS)], 1, 1)


def test_without_a_finding_nothing_but_that_is_said(launcher, tmp_path):
    run = Launched(launcher, tmp_path, TRAINING, "clean")
    assert (run.codes, run.num_ended, run.found, run.num_said, run.num_lists) == ([0, 0], 2, [], 0, 1)
    assert run.err.startswith(
        "ddpcall watch: no findings: 1 DDP model, 5 steps on 2 of 2 ranks, compared 5 times; 5 steps measured: "
    )
    assert run.err.count("\n") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_takes_no_finding_along(launcher, tmp_path, rank):
    """The other rank waits in a collective: it fails, or the agent ends it, as without the watch."""
    run = Launched(launcher, tmp_path, TRAINING, f"kill_{rank}")
    assert run.codes[rank] == -signal.SIGKILL
    assert run.codes[1 - rank] in (1, -signal.SIGTERM)
    assert (run.found, run.num_said) == ([("DC101", BYPASS)], 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_is_shown_while_the_other_waits_in_a_collective(launcher, tmp_path, rank):
    run = Launched(launcher, tmp_path, TRAINING, f"fail_{rank}")
    assert (run.codes[rank], run.num_ended) == (1, 0)
    assert f"ValueError: the script's own error on rank {rank}" in run.err
    assert "ddpcall/watch" not in run.err
    assert (run.found, run.num_said) == ([("DC101", BYPASS)], 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_ends_early_is_not_waited_for(launcher, tmp_path, rank):
    run = Launched(launcher, tmp_path, TRAINING, f"leave_{rank}_alone")
    assert (sorted(run.codes), run.num_ended, run.num_lists) == ([0, 1], 2, 1)
    assert run.out.count("has no more data") == 1
    assert run.found == [("DC101", BYPASS), ("DC101", ALONE)]


def test_a_failure_of_the_watchs_own_lets_the_other_rank_run_its_exit_handlers(launcher, tmp_path):
    """The launcher stops all ranks once one has failed."""
    run = Launched(launcher, tmp_path, TRAINING, "tidy")
    assert (run.codes, run.num_ended, run.num_lists) == ([1, 0], 2, 1)
    assert run.out.count("tidied up") == 1
    assert not list(tmp_path.glob(".f.json*"))


@pytest.mark.parametrize(
    ("mode", "code", "shown"), [("exit_text", 1, "because of this\n"), ("exit_6", 6, ""), ("hard_3", 3, "")]
)
def test_a_rank_that_leaves_with_a_code_keeps_it(launcher, tmp_path, mode, code, shown):
    run = Launched(launcher, tmp_path, TRAINING, mode)
    assert code in run.codes
    assert shown in run.err
    assert (run.found, run.num_said) == ([("DC101", BYPASS)], 1)


@pytest.mark.parametrize(("fail_on", "codes"), [("error", [0, 1]), ("never", [0, 0])])
def test_findings_reach_the_exit_code_of_a_script_that_skips_exit_handlers(launcher, tmp_path, fail_on, codes):
    run = Launched(launcher, tmp_path, TRAINING, "hard_0", options=["--fail-on", fail_on])
    assert (sorted(run.codes), run.num_ended) == (codes, 0)
    assert (run.found, run.num_said, run.num_lists) == ([("DC101", BYPASS)], 1, 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGCONT, 1), (signal.SIGKILL, -9)])
def test_a_stopped_rank_holds_nobody_up(launcher, tmp_path, number, code):
    """Rank 1 stops in the middle; once rank 0 has ended it goes on and reports, or is killed."""
    run = Launched(launcher, tmp_path, TRAINING, "stop_1_alone", afterwards=[[1, int(number)]])
    assert run.codes == [0, code]
    assert run.found == [("DC101", BYPASS), ("DC101", ALONE)]
    assert run.num_lists == (number == signal.SIGCONT)


def test_ranks_outlive_the_host_of_their_store(launcher, tmp_path):
    run = Launched(launcher, tmp_path, TRAINING, "agent_gone")
    assert (sorted(run.codes), run.num_ended) == ([0, 1], 2)
    assert (run.found, run.num_said, run.num_lists) == ([("DC101", BYPASS)], 1, 1)


def test_without_the_store_nothing_is_green(launcher, tmp_path):
    run = Launched(launcher, tmp_path, TRAINING, "clean_agent_gone")
    assert (sorted(run.codes), run.num_ended) == ([0, 2], 2)
    assert run.found == []
    assert "nothing was found, and not all was watched: the ranks were compared" in run.err
