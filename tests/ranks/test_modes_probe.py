"""The modes probe: each thing it watches where it must speak, and where it must not."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ddpcall.probes.modes import observe_modes
from ddpcall.verdicts import judge
from ddpcall.wrappers import Subject
from tests.unit.records import make_evidence

pytestmark = pytest.mark.ranks(2)


def judge_modes_of(modes):
    return judge(make_evidence(modes=modes))


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))


def run_steps(rank, model, steps=3, forward=None):
    """Run forwards on data of the rank's own; returns the evidence."""
    subject = Subject("none", nn.Sequential(model), model)
    group: Any = dist.new_group()
    data = torch.Generator().manual_seed(rank.rank)
    torch.manual_seed(0)
    with observe_modes(subject, group, torch.ones(3, 4)) as observer:
        for step in range(steps):
            observer.note_result((forward or model)(torch.randn(16, 4, generator=data)))
            observer.end_step(step)
        return observer.evidence()


def test_equal_seeds_drop_the_same_positions(rank):
    evidence = run_steps(rank, Net())
    assert evidence.masks_identical == (True, True, True)
    kept = [share for share in evidence.dropout_kept if share is not None]
    assert len(kept) == 3
    assert all(0.3 < share < 0.7 for share in kept)


def test_a_seed_of_its_own_on_each_rank_drops_other_positions(rank):
    model = Net()
    original = torch.manual_seed

    def forward(x):
        original(100 + rank.rank)
        return model(x)

    evidence = run_steps(rank, model, forward=forward)
    assert evidence.masks_identical == (False, False, False)
    assert judge_modes_of(evidence)["dropout"] == "different"


def test_eval_mode_drops_nothing_and_leaves_the_statistics(rank):
    evidence = run_steps(rank, Net().eval())
    assert judge_modes_of(evidence)["modes"] == "eval"
    assert evidence.masks_identical == (None, None, None)
    assert evidence.dropout_kept == (1.0, 1.0, 1.0)
    assert evidence.statistics_difference == (0.0, 0.0, 0.0)
    assert evidence.batches_tracked == (0, 0, 0)
    assert evidence.running_mean_norm == (0.0, 0.0, 0.0)
    assert evidence.running_var_norm == pytest.approx((8**0.5,) * 3)


def test_statistics_of_different_data_part_and_are_counted(rank):
    evidence = run_steps(rank, Net())
    assert all(difference > 0 for difference in evidence.statistics_difference if difference is not None)
    assert evidence.batches_tracked == (1, 2, 3)
    assert len(set(evidence.running_mean_norm)) == len(set(evidence.running_var_norm)) == 3
    assert evidence.evaluation_inner is not None
    assert evidence.evaluation_inner > 0
    verdicts = judge_modes_of(evidence)
    assert (verdicts["statistics"], verdicts["evaluation_inner"]) == ("differ", "differ")


def test_a_model_without_statistics_has_nothing_to_compare(rank):
    evidence = run_steps(rank, nn.Sequential(nn.Linear(4, 2)))
    assert evidence.statistics_difference == (None, None, None)
    assert evidence.running_mean_norm == evidence.running_var_norm == (None, None, None)
    assert (evidence.evaluation_inner, evidence.evaluation_wrapped) == (None, None)


def test_one_rank_in_eval_mode_is_told_by_its_flags(rank):
    model = Net()
    model[3].train(rank.rank == 0)
    evidence = run_steps(rank, model)
    assert evidence.flags_differ == ("3",)
    assert evidence.training_modules == (6, 5)
    assert judge_modes_of(evidence)["modes"] == "differs"


def test_a_frozen_part_is_mixed_on_all_ranks_alike(rank):
    model = Net()
    model[1].eval()
    assert judge_modes_of(run_steps(rank, model))["modes"] == "mixed"


@pytest.mark.parametrize(("enabled", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_precision_is_that_of_the_layers_and_of_the_result(rank, enabled, dtype):
    model = Net()

    def forward(x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return model(x)

    evidence = run_steps(rank, model, forward=forward)
    assert (evidence.compute_dtypes, evidence.result_dtype) == ((dtype,), dtype)
    assert judge_modes_of(evidence)["precision"] == dtype


def test_the_model_is_left_as_it_was(rank):
    model = Net()
    before = [set(module.__dict__) for module in model.modules()]
    run_steps(rank, model, forward=model)
    assert [set(module.__dict__) for module in model.modules()] == before
