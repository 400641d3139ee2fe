"""What was watched, in the last line, the file and the exit code; where it was nothing, that and the reason."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

import ddpcall
from ddpcall.watch.output.watched import (
    ESSENTIAL_PARTS,
    FSDP1,
    Watched,
    WatchedModel,
    merge_watched,
    read_watched,
    weigh,
)
from ddpcall.watch.rules.mixing import Certificate
from tests.watch.launched import Launched

NET = WatchedModel("Net", "ddp", 30)
RANK_0 = Watched(
    attached=True,
    ranks=(0,),
    world_size=2,
    models=(NET,),
    optimizer_steps=30,
    comparisons=17,
    comparisons_due=17,
    process_group=2,
    ended=True,
)
MEASURED = {"steps": 3, "shapes": {"averaged": 3}, "ranks": 2}
BOTH = replace(RANK_0, ranks=(0, 1))
TOLD = asdict(Certificate(steps=8, shapes={"averaged": 8}, shape="averaged", ranks=2, matrix=[[0.5, 0.5]] * 2))
ALONE = replace(
    RANK_0, world_size=1, models=(), optimizer_steps=5, comparisons=0, comparisons_due=0, process_group=0
)


def test_ranks_are_merged_into_one_record():
    rank_1 = replace(RANK_0, ranks=(1,), comparisons=0, optimizer_steps=28, not_followed=(FSDP1,), ended=False)
    merged = merge_watched([RANK_0, rank_1])
    assert merged == replace(BOTH, not_followed=(FSDP1,), ended=False)
    assert read_watched(json.loads(json.dumps(merged, default=vars))) == merged


def test_a_process_that_starts_the_ranks_is_none_of_them():
    parent = replace(ALONE, optimizer_steps=0, idle_ranks=(0,), ended=True)
    assert merge_watched([parent, BOTH]) == BOTH


def test_a_script_that_sends_enough_is_no_evidence_where_measured_steps_could_not_be_told():
    """Weights that each rank steps a share of, and sends: nobody knows whose gradients were used."""
    reason = "on some ranks alone, and not compared: bias, weight"
    mixing = {"steps": 8, "shapes": {"unidentifiable": 8}, "reason": reason}
    unwrapped = replace(BOTH, models=(), comparisons=0, comparisons_due=0, may_average=True, mixing=mixing)
    answer = weigh(unwrapped)
    assert not answer.is_evidence
    assert answer.text == (
        "nothing could be found out: no model was wrapped, and 8 steps were measured: who learned from whom could "
        f"not be told ({reason})"
    )
    assert weigh(replace(unwrapped, mixing={**TOLD, "shapes": {"unidentifiable": 7, "averaged": 1}})).is_evidence
    assert weigh(replace(unwrapped, mixing={"steps": 0, "shapes": {}, "reason": ""})).is_evidence


def test_two_models_of_one_class_stay_two_over_ranks():
    record = replace(RANK_0, models=(NET, NET))
    assert merge_watched([record, replace(record, ranks=(1,))]).models == (NET, NET)


@pytest.mark.parametrize(
    ("watched", "text"),
    [
        (BOTH, "1 DDP model, 30 steps on 2 of 2 ranks, compared 17 times"),
        (
            replace(BOTH, models=(NET, NET, replace(NET, wrapper="fsdp2"))),
            "2 DDP models and 1 FSDP2 model, 30 steps on 2 of 2 ranks, compared 17 times",
        ),
        (
            replace(BOTH, not_attached={"torch.compile": "AttributeError: gone"}),
            "1 DDP model, 30 steps on 2 of 2 ranks, compared 17 times; "
            "watched without: torch.compile (AttributeError: gone)",
        ),
        (
            replace(BOTH, not_followed=(FSDP1,)),
            f"1 DDP model, 30 steps on 2 of 2 ranks, compared 17 times; not followed: {FSDP1}",
        ),
        (
            replace(BOTH, comparisons=0, comparisons_due=0),  # --every 0
            "1 DDP model, 30 steps on 2 of 2 ranks",
        ),
        (
            replace(RANK_0, elsewhere=(1,)),  # another host's
            "1 DDP model, 30 steps on 1 of 2 ranks (the others report by themselves), compared 17 times",
        ),
        (
            replace(BOTH, error="ValueError"),
            "1 DDP model, 30 steps on 2 of 2 ranks, compared 17 times, until it ended with ValueError",
        ),
        (
            replace(BOTH, models=(), own_collectives=3, may_average=True, comparisons=0, comparisons_due=0),
            "no wrapped model, 30 steps on 2 of 2 ranks: hooks, compiled code and precision were watched, "
            "gradients that the script reduces itself were not",
        ),
        (
            ALONE,
            "one process, 5 steps: hooks, compiled code and precision were watched; gradients need two ranks",
        ),
        (
            replace(ALONE, optimizer_steps=0, idle_ranks=(0,)),
            "one process, no optimizer step: hooks, compiled code and precision were watched; "
            "gradients need two ranks",
        ),
    ],
)
def test_what_was_watched_is_said(watched, text):
    answer = weigh(watched)
    assert (answer.text, answer.is_evidence) == (text, True)


@pytest.mark.parametrize(
    ("watched", "text"),
    [
        (Watched(ranks=(0,)), "nothing was watched: train.py never imported torch"),
        (
            Watched(ranks=(0,), not_attached={"torch": "RuntimeError: no"}),
            "nothing was watched: the watch could not attach to torch (RuntimeError: no)",
        ),
        (Watched(ranks=(0,), error="ImportError"), "train.py ended with ImportError before it imported torch"),
        (replace(ALONE, optimizer_steps=0, error="OSError"), "ended with OSError before its first optimizer step"),
        (replace(ALONE, process_group=1), "there is one process (the process group has one rank)"),
        (replace(ALONE, started_alone=True), "there is one process (the launcher started one of several)"),
        (RANK_0, "1 of 2 ranks was watched: nothing is known of rank 1"),
        (RANK_0, "has to hand its environment on to each, `env={**os.environ, …}`"),
        (replace(BOTH, models=(), not_followed=(FSDP1,)), f"{FSDP1} is not followed by the watch. To have it"),
        (replace(BOTH, optimizer_steps=0), "no step of a torch optimizer was taken on 1 DDP model"),
        (replace(BOTH, idle_ranks=(1,)), "rank 1 took no optimizer step, another rank 30"),
        (replace(BOTH, idle_ranks=(1,)), "check with `ddpcall.asserts.assert_replicated(model)`, on every rank,"),
        (replace(BOTH, models=(replace(NET, steps=0),)), "changed no parameter of 1 DDP model"),
        (replace(BOTH, models=(), own_collectives=3), "no model was wrapped, collectives carried too little"),
        (replace(BOTH, models=()), "a model of its own. Write `model = DistributedDataParallel(model)`"),
        (
            replace(BOTH, models=(), process_group=0),
            "a model of its own. Write `dist.init_process_group()` and then",
        ),
        (
            replace(BOTH, models=(), process_group=1, own_collectives=1, may_average=True),
            "every rank made a process group of one, so each of 2 ranks",
        ),
        (
            replace(BOTH, comparisons=0, not_compared="ConnectionError: gone"),
            "the ranks could not be compared (ConnectionError: gone)",
        ),
        (
            replace(BOTH, models=(), may_average=True, comparisons=0, comparisons_due=0, not_compared="gone"),
            "the ranks could not be compared (gone)",
        ),
        (
            replace(BOTH, comparisons=2, comparisons_due=5, not_compared="gone"),
            "the ranks were compared 2 times and then no more (gone)",
        ),
        (
            replace(
                BOTH,
                models=(),
                may_average=True,
                mixing=MEASURED,
                comparisons=0,
                comparisons_due=0,
                not_compared="gone",
            ),
            "the ranks were compared 3 times and then no more (gone)",
        ),
        (
            replace(BOTH, comparisons=0, error="exit code 143"),
            "train.py ended with exit code 143 before the ranks were compared",
        ),
        (replace(BOTH, faults=("ZeroDivisionError: ours",)), "an error of its own (ZeroDivisionError: ours)"),
        (replace(BOTH, not_attached={ESSENTIAL_PARTS[0]: "AttributeError: gone"}), "gradients are not watched"),
    ],
)
def test_where_too_little_was_watched_the_reason_is_said(watched, text):
    answer = weigh(watched)
    assert text in answer.text
    assert not answer.is_evidence


def test_a_session_tells_what_it_watched():
    with ddpcall.watch(on_finding="record") as session:
        assert session.watched.attached
        assert not session.watched.ended
    assert session.watched.ended
    assert (session.watched.ranks, session.watched.optimizer_steps) == ((0,), 0)


RANKS = """
import os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

mode, rank = sys.argv[1], int(os.environ["RANK"])
if mode == "group_of_one":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
elif mode != "no_group":
    # No collective follows in some modes: a rank that is fast would leave while another still connects to it.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group("gloo")
    store.set(f"connected {rank}", "")
    store.wait(["connected 0", "connected 1"])
torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
if mode == "fsdp1":
    from torch.distributed.fsdp import FullyShardedDataParallel
    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
elif mode == "data_parallel":
    model = torch.nn.DataParallel(model)
elif mode not in ("no_group", "unwrapped", "logged", "averaged", "local_sgd"):
    model = DistributedDataParallel(model)
if mode == "logged":
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
torch.manual_seed(rank)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    if mode == "no_step" or (mode == "idle" and rank == 1) or (mode == "dies" and rank == 1):
        break
    loss = model(torch.randn(3, 4)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    if mode == "averaged":
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
    if mode == "by_hand":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    else:
        optimizer.step()
    if mode == "logged":
        logged = loss.detach().clone()
        dist.all_reduce(logged)
    if mode == "local_sgd" and step == 2:
        for parameter in model.parameters():
            dist.all_reduce(parameter.data)
    if mode == "idle":
        break
if mode == "idle" and rank == 1:
    model(torch.randn(3, 4)).sum().backward()
if mode == "dies":
    raise ValueError("too early")
if dist.is_initialized():
    del model
    dist.destroy_process_group()
"""


def answer_of(launcher, directory, mode, *options):
    run = Launched(launcher, directory, RANKS, mode, options=options)
    assert run.err.count("ddpcall watch: ") == 1, run.err
    line = next(line for line in run.err.splitlines() if line.startswith("ddpcall watch: "))
    watched = json.loads((directory / "f.json").read_text())["watched"]
    return run.codes, line.removeprefix("ddpcall watch: "), watched


def test_a_proper_run_says_what_was_watched(launcher, tmp_path):
    codes, line, watched = answer_of(launcher, tmp_path, "clean")
    assert codes == [0, 0]
    assert line.startswith(
        "no findings: 1 DDP model, 3 steps on 2 of 2 ranks, compared 3 times; 3 steps measured: every rank used "
        "the mean of both ranks' gradients (largest residual "
    )
    assert watched["mixing"]["shapes"] == {"averaged": 3}
    assert watched["mixing"]["residual"] < 1e-6
    assert np.allclose(watched["mixing"]["matrix"], 0.5, atol=1e-6)
    assert (watched["attached"], watched["ranks"], watched["world_size"]) == (True, [0, 1], 2)
    assert watched["models"] == [{"name": "Linear", "wrapper": "ddp", "steps": 3}]
    assert (watched["optimizer_steps"], watched["comparisons"], watched["ended"]) == (3, 3, True)
    assert watched["not_followed"] == []


@pytest.mark.parametrize("mode", ["averaged", "local_sgd"])
def test_what_the_script_averages_itself_is_fine_and_said(launcher, tmp_path, mode):
    codes, line, _ = answer_of(launcher, tmp_path, mode)
    assert codes == [0, 0]
    assert line.startswith("no findings: no wrapped model, 3 steps on 2 of 2 ranks")


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("no_step", "no step of a torch optimizer was taken on 1 DDP model"),
        ("idle", "rank 1 took no optimizer step, another rank 1"),
        ("by_hand", "no optimizer step used the gradients of 1 DDP model. To have it watched, let an"),
        ("no_group", "no process group was made"),
        ("group_of_one", "every rank made a process group of one"),
    ],
)
def test_where_nothing_could_be_found_out_the_run_does_not_succeed(launcher, tmp_path, mode, reason):
    codes, line, _ = answer_of(launcher, tmp_path, mode)
    assert sorted(codes) == [0, 2], line
    assert line.startswith("nothing could be found out: ")
    assert reason in line


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("unwrapped", "no model was wrapped, no collective called"),
        ("logged", "no model was wrapped, collectives carried too little for gradients"),
        ("fsdp1", "FullyShardedDataParallel (FSDP1) is not followed by the watch. To have it watched, shard"),
        ("data_parallel", "torch.nn.DataParallel is not followed"),
    ],
)
def test_what_is_not_followed_and_not_measured_proves_nothing(launcher, tmp_path, mode, reason):
    codes, line, _ = answer_of(launcher, tmp_path, mode, "--every", "0")
    assert sorted(codes) == [0, 2], line
    assert line.startswith("nothing could be found out: ")
    assert reason in line


@pytest.mark.parametrize("mode", ["unwrapped", "logged", "data_parallel"])
def test_a_model_that_nothing_averages_is_found_without_any_wrapper(launcher, tmp_path, mode):
    codes, line, watched = answer_of(launcher, tmp_path, mode)
    assert sorted(codes) == [0, 1], line
    assert line.startswith("1 error; `ddpcall explain DC101` says more; no wrapped model")
    assert watched["mixing"]["shapes"] == {"local": 3}


def test_a_stack_that_is_not_followed_is_measured_all_the_same(launcher, tmp_path):
    codes, line, watched = answer_of(launcher, tmp_path, "fsdp1")
    assert codes == [0, 0], line
    assert line.startswith("no findings: no wrapped model, 3 steps on 2 of 2 ranks; 3 steps measured: every rank ")
    assert watched["mixing"]["shapes"] == {"averaged": 3}


def test_with_fail_on_never_it_does(launcher, tmp_path):
    codes, line, _ = answer_of(launcher, tmp_path, "no_step", "--fail-on", "never")
    assert codes == [0, 0]
    assert line.startswith("nothing could be found out: no step of a torch optimizer was taken")
