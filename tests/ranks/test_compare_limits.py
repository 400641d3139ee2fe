"""The limits of both comparisons: a reason that is said or an honest cause, and no false word either way."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ddpcall.compare.files import NotARecord, open_run
from ddpcall.compare.two_runs import compare_runs
from tests.ranks.test_record_and_compare import compare_with_one, record
from tests.ranks.test_record_and_compare import make_model as make_recorded
from tests.ranks.test_same_as_one_process import compare, make_model, mean_step, reduce_by_hand

pytestmark = pytest.mark.ranks(2)

DRAWS = {
    "torch": lambda inputs: torch.rand_like(inputs),
    "numpy": lambda inputs: torch.from_numpy(np.random.rand(*inputs.shape)).to(inputs),
    "Python": lambda inputs: inputs.new_tensor([random.random() for _ in range(inputs.numel())]).view_as(inputs),
    "nobody's": lambda inputs: torch.from_numpy(np.random.default_rng().random(inputs.shape)).to(inputs),
}


@pytest.mark.parametrize("draws", DRAWS)
def test_augmentation_in_place_is_random_and_that_is_said(draws):
    def step(model, batch):
        batch[0].mul_(1 + DRAWS[draws](batch[0]))
        return mean_step(model, batch)

    result = compare(step)
    assert (result.same, result.cause) == (False, "unexplained"), result.message
    assert "draws random numbers" in result.message


def test_augmentation_in_place_without_random_numbers_is_the_same():
    def step(model, batch):
        batch[0].mul_(1.5).add_(batch[1][:, None])
        return mean_step(model, batch)

    assert compare(step, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), steps=2).cause == "same"


@pytest.mark.parametrize("seeds", [True, False], ids=["by_sample", "at_random"])
def test_data_that_the_step_loads_itself(seeds):
    """From a seed that the sample decides it is the same on whatever rank; from the state of the process not."""

    def step(model, batch):
        inputs = [
            torch.randn(8, generator=torch.Generator().manual_seed(int(y) + round(float(x[0]) * 1e4)))
            if seeds
            else torch.randn(8)
            for x, y in zip(*batch, strict=True)
        ]
        return mean_step(model, (torch.stack(inputs), batch[1]))

    result = compare(step)
    assert result.cause == ("same" if seeds else "unexplained"), result.message
    assert ("draws random numbers" in result.message) is not seeds


@pytest.mark.parametrize(("change", "cause"), [("none", "same"), ("scaled", "module"), ("shifted", "unexplained")])
def test_models_that_differ_by_rank_are_named_so(change, cause):
    """Logits that are all shifted alike have the same gradients: even so the ranks train two models."""

    def wrap(model):
        with torch.no_grad():
            if dist.get_rank() and change == "scaled":
                model[2].weight.mul_(1.5)
            if dist.get_rank() and change == "shifted":
                model[2].weight.add_(0.5)
        return model

    def step(model, batch):
        loss = mean_step(model, batch)
        reduce_by_hand(model, dist.get_world_size())
        return loss

    result = compare(step, wrap=wrap)
    assert result.cause == cause, result.message
    said = "The ranks do not hold the same weights before the step: 2.weight." in result.message
    assert said is (cause != "same")


def average_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            dist.all_reduce(parameter)
            parameter /= dist.get_world_size()


@pytest.mark.parametrize("every", [1, 3])
def test_local_sgd_is_said_to_average_no_gradients(every):
    calls = {}

    def step(model, batch):
        number = calls[id(model)] = calls.get(id(model), -1) + 1
        if number and number % every == 0:
            average_weights(model)  # what the optimizer made of the step before
        return mean_step(model, batch)

    result = compare(
        step, make_model(), wrap=lambda model: model, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), steps=4
    )
    assert (result.cause, result.step) == ("weighted", 0), result.message
    assert "whether they average their weights afterwards, as in local SGD, is not compared" in result.message


# ---- two recorded runs -----------------------------------------------------------------------------------------


def test_recorded_ranks_with_other_weights_differ_in_their_parameters(tmp_path):
    def make():
        return make_recorded(seed=dist.get_rank())

    result = compare_with_one(tmp_path, make=make, wrap=lambda model: model)
    assert (result.same, result.cause) == (False, "parameters"), result.message


def test_recorded_local_sgd_differs_in_the_gradients(tmp_path):
    result = compare_with_one(tmp_path, wrap=lambda model: model)
    assert (result.same, result.cause) == (False, "weighted"), result.message
    assert "The gradients of B's ranks are not averaged" in result.message


@pytest.mark.ranks(1)
@pytest.mark.parametrize("in_place", [True, False])
def test_recorded_augmentation_is_not_comparable(tmp_path, in_place):
    def train_augmented(model, seed):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs = torch.ones(4, 8).cumsum(0)
        noise = torch.rand(4, 8, generator=torch.Generator().manual_seed(seed))
        inputs = inputs.mul_(noise) if in_place else inputs * noise
        model(inputs).sum().backward()
        optimizer.step()

    for name, seed in (("A", 1), ("B", 2), ("C", 1)):
        record(tmp_path / name, train_augmented, make_recorded(), seed)
    with pytest.raises(NotARecord, match="no sample is in both runs"):
        compare_runs(open_run(tmp_path / "A"), open_run(tmp_path / "B"))
    assert compare_runs(open_run(tmp_path / "A"), open_run(tmp_path / "C")).same
