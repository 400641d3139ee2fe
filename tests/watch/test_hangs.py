"""While a run hangs: who waits where, on disk and on stderr; a rank that is slow is not accused."""

import pytest

from tests.watch.launched import Launched

SCRIPT = """
import os, signal, sys, threading, time
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def has(file, text):
    return os.path.exists(file) and text in open(file).read()


def until(file, text):
    while not has(file, text):
        time.sleep(0.01)


def leave_when_found():
    until("f.json", '"DC503"')
    until("err", "DC503")
    os.kill(os.getpid(), signal.SIGKILL)


def main(kind):
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DDP(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for step in range(3 if (kind, rank) == ("fewer", 1) else 4):
        loss = model(torch.randn(8, 4)).square().mean()
        if (kind, step, rank) == ("skip", 2, 1):
            dist.barrier()  # elsewhere
            continue
        optimizer.zero_grad()
        loss.backward()  # backward
        optimizer.step()
        if (kind, step, rank) == ("slow", 2, 0):
            until("err", "no progress")
    if (kind, rank) == ("left", 0):
        dist.barrier()  # alone


dist.init_process_group("gloo")
if sys.argv[1] in ("skip", "left"):
    threading.Thread(target=leave_when_found, daemon=True).start()
main(sys.argv[1])
"""
LINES = SCRIPT.splitlines()


def line(comment):
    return next(number for number, text in enumerate(LINES, 1) if text.endswith(f"# {comment}"))


@pytest.fixture
def run(launcher, tmp_path):
    return lambda kind, after="0.4": Launched(launcher, tmp_path, SCRIPT, kind, options=["--hang-after", after])


def test_a_skipped_backward_is_named_while_the_run_hangs(run):
    done = run("skip")
    assert done.found == [("DC503", line("backward"))]
    assert f"rank 1: waits in `barrier` at train.py:{line('elsewhere')}" in done.err
    assert "Rank 1 skipped the backward here" in done.err


def test_a_rank_that_waits_for_one_whose_script_is_over_is_named(run):
    assert run("left").found == [("DC503", line("alone"))]


def test_a_slow_rank_is_told_of_and_not_accused(run):
    done = run("slow")
    assert (done.found, done.codes) == ([], [0, 0])
    assert f"rank 1: waits in `backward` at train.py:{line('backward')}" in done.err
    assert "rank 0: runs at train.py:" in done.err


@pytest.mark.parametrize("after", ["60", "0"])
def test_a_rank_that_failed_for_want_of_another_says_who_took_fewer_steps(run, after):
    done = run("fewer", after)
    assert done.found == [("DC502", line("backward"))]
    assert "its script was over after 3 forwards, 3 backwards, 3 steps" in done.err
