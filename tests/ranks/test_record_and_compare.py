"""Two recorded runs: what differs first, each beside a look-alike in which nothing does."""

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ddpcall.compare.command import main
from ddpcall.compare.files import NotARecord, Writer, open_run
from ddpcall.compare.program import insert_recorder, parse_steps
from ddpcall.compare.record import Recorder
from ddpcall.compare.two_runs import compare_runs

on_two_ranks = pytest.mark.ranks(2)


def make_model(*extra, seed=0, width=16):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), *extra, nn.Tanh(), nn.Linear(width, 4))


def train(model, parts=1, part=0, steps=3, num_samples=16, order=1, lr=0.01, reduction="mean", micro=1):
    """Train on a part of every batch, as a script does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(7))
    targets = (inputs.sum(dim=1) > 0).long()
    generator = torch.Generator().manual_seed(order)
    for _ in range(steps):
        batch = torch.randperm(64, generator=generator)[:num_samples].tensor_split(parts)[part]
        optimizer.zero_grad()
        for share in batch.tensor_split(micro):
            loss = F.cross_entropy(model(inputs[share]), targets[share], reduction=reduction) / micro
            loss.backward()
        optimizer.step()


def record(directory, run, *args, rank=0, num_ranks=1, steps="", max_mb=10.0, **kwargs):
    wants, num_steps = parse_steps(steps)
    recorder = Recorder(Writer(directory, rank, num_ranks, "a run", num_steps, max_mb), wants)
    recorder.install()
    try:
        run(*args, **kwargs)
    finally:
        recorder.close()
    return directory


def compare_with_one(place, make=make_model, wrap: Any = DistributedDataParallel, alone=None, **kwargs):
    """Record one process as A and two ranks as B; return what comparing them says.

    Args:
        place: A directory that both ranks have.
        make: Makes the model of both.
        wrap: Makes what the ranks train.
        alone: What one process does otherwise.
        kwargs: Of `train`, of both.
    """
    rank = dist.get_rank()
    if rank == 0:
        record(place / "A", train, make(), **kwargs | (alone or {}))
    dist.barrier()
    record(place / "B", train, wrap(make()), parts=2, part=rank, rank=rank, num_ranks=2, **kwargs)
    dist.barrier()
    return compare_runs(open_run(place / "A"), open_run(place / "B"))


# ---- the same --------------------------------------------------------------------------------------------------


@on_two_ranks
def test_two_ranks_and_one_process_are_the_same(tmp_path):
    result = compare_with_one(tmp_path)
    assert (result.same, result.cause) == (True, "same")
    assert [rung.status for rung in result.rungs] == ["same"] * 18
    assert result.message == "Nothing differs in 3 steps (0, 1, 2), within the floor of each line."
    assert all(values["gradients"] < 1e-5 for values in result.curve.values())


@on_two_ranks
def test_sharded_parameters_are_the_same(tmp_path):
    def shard(model):
        for layer in (model[0], model[2]):
            fully_shard(layer)
        return fully_shard(model)

    result = compare_with_one(tmp_path, wrap=shard)
    assert result.same, result.message


@on_two_ranks
def test_accumulation_is_the_same(tmp_path):
    result = compare_with_one(tmp_path, micro=2)
    assert result.same, result.message


@pytest.mark.ranks(1)
def test_a_compiled_model_is_the_same_and_its_modules_are_not_compared(tmp_path):
    a = record(tmp_path / "A", train, make_model())
    b = record(tmp_path / "B", train, torch.compile(make_model(), backend="eager"))
    result = compare_runs(open_run(a), open_run(b))
    assert result.same, result.message
    assert "B is compiled: of its modules the last output alone was kept." in result.notes


# ---- the first thing that differs ------------------------------------------------------------------------------


@on_two_ranks
def test_uneven_shares_are_weighted_in_the_loss(tmp_path):
    result = compare_with_one(tmp_path, num_samples=17)
    assert (result.same, result.cause, result.rungs[-1].what) == (False, "weighted", "loss")
    assert result.weights == pytest.approx((0.5, 0.5), abs=1e-3)
    assert result.reference_weights == pytest.approx((9 / 17, 8 / 17), abs=1e-3)
    assert "as their numbers of target tokens 9 and 8 do" in result.message


@on_two_ranks
def test_a_sum_is_scaled(tmp_path):
    result = compare_with_one(tmp_path, reduction="sum")
    assert (result.cause, result.rungs[-1].what) == ("scaled", "loss")
    assert result.scale == pytest.approx(0.5, abs=1e-4)
    assert "Every gradient of B is 0.5 times that of A: a loss that is a sum" in result.message


@on_two_ranks
def test_ranks_that_are_not_averaged_differ_in_the_gradients(tmp_path):
    result = compare_with_one(tmp_path, wrap=lambda model: model)
    assert result.rungs[-1].what == "gradients"
    assert "The gradients of B's ranks are not averaged." in result.message


@on_two_ranks
def test_batch_norm_over_a_share_is_the_first_module(tmp_path):
    result = compare_with_one(tmp_path, make=lambda: make_model(nn.BatchNorm1d(16)))
    assert (result.cause, result.where) == ("modules", "1")
    assert "1 (BatchNorm1d): its output differs for 16 of 16 samples" in result.message


@on_two_ranks
def test_dropout_is_named_as_random(tmp_path):
    result = compare_with_one(tmp_path, make=lambda: make_model(nn.Dropout(0.5)))
    assert result.where == "1"
    assert "Its masks are random: record both runs with dropout 0." in result.message


@pytest.mark.ranks(1)
@pytest.mark.parametrize(("seed", "lr", "said"), [(1, 0.01, True), (0, 0.02, False), (0, 0.01, False)])
def test_another_random_state_is_a_note_where_something_differs(tmp_path, seed, lr, said):
    def train_seeded(model, seed, lr):
        torch.manual_seed(seed)
        train(model, lr=lr)

    record(tmp_path / "A", train_seeded, make_model(nn.Dropout(0.5)), 0, 0.01)
    record(tmp_path / "B", train_seeded, make_model(nn.Dropout(0.5)), seed, lr)
    result = compare_runs(open_run(tmp_path / "A"), open_run(tmp_path / "B"))
    assert result.same is (seed == 0 and lr == 0.01), result.message
    told = "When step 0 begins, the random state of torch is another in B than in A: dropout"
    assert any(note.startswith(told) for note in result.notes) is said
    assert said or not any("random state" in note for note in result.notes)


@on_two_ranks
def test_a_learning_rate_differs_in_the_update(tmp_path):
    result = compare_with_one(tmp_path, lr=0.02, alone={"lr": 0.01})
    assert result.rungs[-1].what == "update"
    assert "Learning rates are 0.01 in A and 0.02 in B." in result.message


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    ("other", "kwargs", "what", "said"),
    [
        (make_model(seed=1), {}, "parameters", "Seed both runs alike, or load the same checkpoint."),
        (make_model(), {"num_samples": 17}, "samples", "16 of 16 in A and of 17 in B are in both"),
        (make_model(), {"micro": 2, "num_samples": 15}, "samples", "15 of 16 in A and of 15 in B"),
    ],
)
def test_one_process_against_another(tmp_path, other, kwargs, what, said):
    runs = [record(tmp_path / "A", train, make_model()), record(tmp_path / "B", train, other, **kwargs)]
    result = compare_runs(*map(open_run, runs))
    assert (result.same, result.rungs[-1].what, result.rungs[-1].step) == (False, what, 0)
    assert said in result.message


@pytest.mark.ranks(1)
def test_what_begins_later_is_told_with_its_step(tmp_path):
    def train_and_stumble(model):
        count = [0]
        model[2].register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
        model[2].register_forward_hook(lambda _, args, output: output * 1.01 if count[0] == 3 else output)
        train(model, steps=4)

    a = record(tmp_path / "A", train, make_model())
    b = record(tmp_path / "B", train_and_stumble, make_model())
    result = compare_runs(open_run(a), open_run(b))
    assert (result.rungs[-1].step, result.rungs[-1].what, result.where) == (2, "modules", "2")


@pytest.mark.ranks(1)
@pytest.mark.parametrize(("noise", "is_same"), [(1.0, False), (1.002, True)])
def test_what_two_records_of_the_same_differ_by_is_noise(tmp_path, noise, is_same):
    def train_times(model, factor):
        model[2].register_forward_hook(lambda module, args, output: output * factor)
        train(model)

    a, b, c = (
        record(tmp_path / name, train_times, make_model(), factor)
        for name, factor in (("A", 1.0), ("B", 1.002), ("C", noise))
    )
    result = compare_runs(*map(open_run, (a, b, c)))
    assert result.same == is_same, result.message


# ---- not comparable --------------------------------------------------------------------------------------------


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    ("other", "kwargs", "said"),
    [
        (make_model(width=8), {}, "A and B train other models: 3 of 4 parameters"),
        (make_model(nn.LayerNorm(16)), {}, "A and B train other models"),
    ],
)
def test_another_model_is_not_comparable(tmp_path, capsys, other, kwargs, said):
    a, b = record(tmp_path / "A", train, make_model()), record(tmp_path / "B", train, other, **kwargs)
    assert main(a, b, None, tmp_path / "x.json", None) == 2
    assert f"ddpcall compare: not comparable: {said}" in capsys.readouterr().err
    assert json.loads((tmp_path / "x.json").read_text())["same"] is None


@pytest.mark.ranks(1)
def test_no_common_samples_are_not_comparable(tmp_path):
    def train_on_noise(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.rand(4, 8)).sum().backward()
        optimizer.step()

    a, b = record(tmp_path / "A", train, make_model()), record(tmp_path / "B", train_on_noise, make_model())
    with pytest.raises(NotARecord, match="no sample is in both runs"):
        compare_runs(open_run(a), open_run(b))


@pytest.mark.ranks(1)
def test_no_common_step_is_not_comparable(tmp_path):
    a = record(tmp_path / "A", train, make_model(), steps="0")
    b = record(tmp_path / "B", train, make_model(), steps="1-2")
    with pytest.raises(NotARecord, match="no step was recorded in both: A has 0, B has 1, 2"):
        compare_runs(open_run(a), open_run(b))


@pytest.mark.ranks(1)
def test_a_missing_rank_and_a_damaged_file_are_said(tmp_path):
    a = record(tmp_path / "A", train, make_model(), num_ranks=2)
    with pytest.raises(NotARecord, match="lacks rank 1: there is no rank1/"):
        open_run(a)
    b = record(tmp_path / "B", train, make_model())
    (b / "rank0" / "step00000000.npz").write_bytes(b"PK")
    with pytest.raises(NotARecord, match=r"step00000000.npz cannot be read"):
        compare_runs(open_run(b), open_run(b))


@pytest.mark.ranks(1)
def test_pickles_are_not_read(tmp_path):
    a = record(tmp_path / "A", train, make_model(), steps="0")
    np.savez(a / "rank0" / "step00000000.npz", record=np.array([print], dtype=object))
    with pytest.raises(NotARecord, match="allow_pickle=False"):
        open_run(a).load(0)


# ---- the record itself -----------------------------------------------------------------------------------------


@pytest.mark.ranks(1)
def test_everything_is_taken_off_and_training_is_unchanged(tmp_path):
    names = [(nn.Module, "__call__"), (torch.optim.Optimizer, "__init__"), (torch.autograd, "backward")]
    names += [(F, "cross_entropy"), (torch.amp.GradScaler, "scale")]
    before = [getattr(*name) for name in names]
    model, other = make_model(), make_model()
    record(tmp_path / "A", train, model)
    train(other)
    assert [getattr(*name) for name in names] == before
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.ranks(1)
def test_the_size_is_said_and_kept(tmp_path, capsys):
    a = record(tmp_path / "A", train, make_model(), max_mb=0.012)
    said = capsys.readouterr().err
    assert "MB a step and rank, and never more than 0.012 MB a rank" in said
    assert "step 1 and later ones did not fit into 0.012 MB: give more with --max-mb" in said
    assert open_run(a).steps == (0,)


@pytest.mark.ranks(1)
def test_chosen_steps_alone_are_kept(tmp_path):
    assert open_run(record(tmp_path / "A", train, make_model(), steps="0-9")).steps == (0, 1, 2)
    assert open_run(record(tmp_path / "B", train, make_model(), steps="1")).steps == (1,)


@pytest.mark.ranks(1)
def test_an_older_record_is_replaced_and_nothing_else(tmp_path):
    record(tmp_path / "A", train, make_model())
    assert open_run(record(tmp_path / "A", train, make_model(), steps="0")).steps == (0,)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("…")
    with pytest.raises(ValueError, match="holds something that is no record: give --out a new directory"):
        record(tmp_path / "mine", train, make_model())
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("text", ["x", "3-1", "1-2-x", ","])
def test_steps_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="write numbers and ranges"):
        parse_steps(text)


def test_steps_by_default_are_the_first_and_powers_of_two():
    wants, num_steps = parse_steps("")
    assert ([step for step in range(40) if wants(step)], num_steps) == ([0, 1, 2, 3, 4, 8, 16, 32], None)
    assert parse_steps("0-2,7")[1] == 4


R = ["-m", "ddpcall", "record"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            "torchrun --nproc-per-node 2 train.py --lr 1",
            ["torchrun", "--nproc-per-node", "2", *R, "train.py", "--lr", "1"],
        ),
        ("torchrun -m pkg.train -m x", ["torchrun", *R, "-m", "pkg.train", "-m", "x"]),
        ("python -m torch.distributed.run train.py", ["python", "-m", "torch.distributed.run", *R, "train.py"]),
        ("python -u train.py -u", ["python", "-u", *R, "train.py", "-u"]),
        ("python -X dev -m pkg.train", ["python", "-X", "dev", *R, "-m", "pkg.train"]),
    ],
)
def test_the_recorder_is_put_in_front_of_the_script(command, expected):
    assert insert_recorder(command.split(), R) == expected


@pytest.mark.parametrize(
    "command", ["accelerate launch train.py", "python -c pass", "python", "torchrun --no-python x"]
)
def test_other_commands_are_refused(command):
    with pytest.raises(ValueError, match=r"train\.py"):
        insert_recorder(command.split(), R)


SCRIPT = """
import sys
import torch

model = torch.nn.Linear(4, 2)
torch.nn.init.ones_(model.weight)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(int(sys.argv[1])):
    model(torch.ones(3, 4) + torch.arange(3)[:, None]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print("trained", *sys.argv[1:])
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize(("steps", "code", "expected"), [(2, 0, 0), (2, 3, 3), (0, 0, 2)])
def test_a_script_is_recorded_unchanged(tmp_path, steps, code, expected):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "ddpcall", "record", "--out", "A", "--", sys.executable, "train.py"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    run = subprocess.run(
        [*command, str(steps), str(code)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == expected, run.stderr
    assert run.stdout == f"trained {steps} {code}\n"
    assert ("nothing was recorded" in run.stderr) == (steps == 0)
    assert len(list(tmp_path.glob("A/rank0/step*.npz"))) == steps


@pytest.mark.ranks(1)
def test_the_answer_in_the_terminal_and_on_the_page(tmp_path, capsys):
    from ddpcall.lab.report.compared import render_page

    a = record(tmp_path / "A", train, make_model())
    b = record(tmp_path / "B", train, make_model(nn.Identity()), lr=0.02)
    capsys.readouterr()
    assert main(a, a, None, None, None) == 0
    assert "Nothing differs in 3 steps (0, 1, 2)" in capsys.readouterr().out
    renamed = record(tmp_path / "C", train, make_model(), lr=0.02)
    assert main(a, renamed, None, tmp_path / "x.json", (tmp_path / "x.html", render_page)) == 1
    out = capsys.readouterr().out
    assert "step 0    parameters  same     0.0e+00  (floor 1.0e-04)" in out
    assert "          update      DIFFERS" in out
    assert "Note: The floor is assumed, not measured. Record A once more and give that with --noise" in out
    assert main(a, a, a, None, None) == 0
    assert "assumed" not in capsys.readouterr().out
    page = (tmp_path / "x.html").read_text()
    assert {"✓ same", "✗ differs", "<polyline"} == {
        text for text in ("✓ same", "✗ differs", "<polyline") if text in page
    }
    assert json.loads((tmp_path / "x.json").read_text())["rungs"][-1]["what"] == "update"
    assert main(a, b, None, None, None) == 2
