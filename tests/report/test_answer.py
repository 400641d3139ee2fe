"""The answer in one sentence: computed from verdicts, and nothing else."""

import dataclasses

import pytest

from ddpcall.evidence import Cell
from ddpcall.lab.records import RunRecord, TrialRecord
from ddpcall.lab.report.answer import answer, status
from ddpcall.lab.report.words import label_group, values_that_tell
from tests.report.made import ENVIRONMENT, make_consequence

HOOKS = {"hooks_wrapped": "fired", "hooks_inner": "fired", "hooks_submodules": "fired"}


def trial(path: str, wrapper: str = "ddp", **verdicts: str) -> TrialRecord:
    gradients = verdicts.get("gradients", "synced")
    consequence = make_consequence(gradients == "synced") if gradients in ("synced", "local") else None
    words = {"gradients": gradients, **HOOKS, **verdicts}
    return TrialRecord(cell=Cell(wrapper=wrapper, path=path), verdicts=words, consequence=consequence)


def run_of(*trials: TrialRecord, tmp_path, **fields) -> RunRecord:
    return RunRecord(path=tmp_path, trials=trials, environment=ENVIRONMENT, num_steps=60, **fields)


def test_the_bypass_is_told_with_its_price(tmp_path):
    run = run_of(
        trial("call"),
        trial("forward", hooks_wrapped="skipped"),
        *(trial(path, gradients="local", hooks_wrapped="skipped") for path in ("a", "b", "c", "d", "e", "f")),
        tmp_path=tmp_path,
    )
    assert answer(run) == (
        "`call` and `forward` keep the gradients synchronized, while the other 6 leave gradients local to each "
        "rank: "
        "after 60 steps those models lie up to 30.0% apart and classify 70.0% to 80.0% of the test set right, "
        "not 90.0%; only `call` runs every hook."
    )


def test_nothing_lost_is_said_so(tmp_path):
    run = run_of(trial("call"), trial("forward"), tmp_path=tmp_path)
    assert answer(run) == "Both ways keep the gradients synchronized; no hook is skipped."


def test_on_one_rank_nothing_is_said_of_synchronization(tmp_path):
    run = run_of(
        trial("call", gradients="local"),
        trial("forward", gradients="local", hooks_wrapped="skipped"),
        trial("x", gradients="local"),
        tmp_path=tmp_path,
    )
    assert run.environment is not None
    alone = dataclasses.replace(run, environment=dataclasses.replace(run.environment, world_size=1))
    assert answer(alone) == "`forward` skips hooks."


def test_accuracy_is_not_compared_where_the_synchronized_models_differ_among_themselves(tmp_path):
    better = dataclasses.replace(make_consequence(True), test_accuracy=(0.95, 0.95))
    run = run_of(
        trial("call"),
        dataclasses.replace(trial("call", "other"), consequence=better),
        trial("inner_call", gradients="local"),
        tmp_path=tmp_path,
    )
    assert "apart" in answer(run)
    assert "classify" not in answer(run)


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("precision", ("bfloat16", "float32"), "`x` computes in float32, while `call` computes in bfloat16"),
        (
            "statistics",
            ("same", "differ"),
            "`call` keeps running statistics the same on all ranks, while `x` leaves",
        ),
        ("compiled", ("compiled", "eager"), "`call` runs compiled code, while `x` runs eager"),
    ],
)
def test_what_the_experiment_is_about_comes_first(tmp_path, name, words, sentence):
    run = run_of(trial("call", **{name: words[0]}), trial("x", **{name: words[1]}), tmp_path=tmp_path)
    assert answer(run).startswith(sentence)


def test_crashes_and_shards_are_named_before_the_local_ones(tmp_path):
    run = run_of(
        *(
            trial(path, gradients=word)
            for path, word in zip("abcd", ("sharded", "crashed", "none", "local"), strict=True)
        ),
        tmp_path=tmp_path,
    )
    assert answer(run).startswith(
        "`a` trains sharded gradients, `c` gives no parameter a gradient, `b` crashes, and `d` leaves gradients"
    )


def test_trials_without_data_parallelism_are_not_counted_among_the_local_ones(tmp_path):
    run = run_of(
        trial("call"),
        trial("inner_call", gradients="local"),
        trial("call", "compile", gradients="no data parallelism"),
        trial("call", "none", gradients="no data parallelism"),
        tmp_path=tmp_path,
    )
    assert answer(run).startswith(
        "`ddp × call` keeps the gradients synchronized, `compile` and `none` have no data parallelism, and "
        "`inner_call` leaves gradients local to each rank: after 60 steps those models"
    )


def test_a_run_without_trials_says_so(tmp_path):
    run = run_of(tmp_path=tmp_path, outcome="hung", num_trials=7)
    assert answer(run) == "Nothing was measured."
    assert status(run) == ("lost", "The run did not end well (hung): 0 of 7 cells measured.")


def test_the_status_counts_expectations(tmp_path):
    met = dataclasses.replace(trial("call"), expected={"gradients": "synced"})
    missed = dataclasses.replace(met, expected={"gradients": "local"})
    ok = {"tmp_path": tmp_path, "outcome": "ok"}
    assert status(run_of(met, trial("x"), **ok)) == (
        "good",
        "As expected: 1 of 2 cells have expectations, and all hold.",
    )
    assert status(run_of(met, missed, **ok)) == ("lost", "1 of 2 cells is not as expected.")
    assert status(run_of(trial("x"), **ok)) == ("part", "The experiment expects nothing of its 1 cell.")


def test_groups_are_named_by_the_fewest_axes_that_tell_them_apart():
    cells = [
        Cell(wrapper=w, path=p, mode=m) for w in ("ddp", "join") for p in ("call", "x") for m in ("train", "eval")
    ]
    assert values_that_tell([c for c in cells if c.path == "x"], cells, 3) == ["x"]
    assert values_that_tell([c for c in cells if c.path == "x" and c.mode == "eval"], cells, 3) == ["x × eval"]
    assert values_that_tell(cells[:1], cells, 3) == ["ddp × call × train"]
    assert label_group(cells, cells) == "all 8 cells"
    assert label_group(cells[:7], cells) == "ddp × call × train and 6 more"
