"""DC403: padding that is counted in an evaluation's sums, on two ranks, on their line; what looks alike."""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ddpcall

pytestmark = pytest.mark.ranks(2, timeout=120)


@pytest.fixture
def evaluating(rank, tmp_path):
    evaluating = Evaluating(rank, tmp_path)
    yield evaluating
    evaluating.session.close()


class Evaluating:
    """Evaluates a wrapped model under a watch."""

    def __init__(self, rank, tmp_path):
        self.rank = rank.rank
        self.barrier = rank.barrier
        self.session = ddpcall.watch(on_finding="record", json=tmp_path / "f.json")
        self.model = DistributedDataParallel(nn.Linear(1, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def count(self, num=61, steps=False, left_out=0, **options):
        """Go through this rank's share; return the number of samples that are counted."""
        data = TensorDataset(torch.arange(float(num))[:, None])
        counted = -left_out
        self.model.train(steps)
        for (batch,) in DataLoader(data, batch_size=8, sampler=DistributedSampler(data, **options)):
            with torch.set_grad_enabled(steps):
                outputs = self.model(batch)
            if steps:
                outputs.mean().backward()
                self.optimizer.step()
            counted += len(batch)
        return counted

    def found(self):
        """End the watch on both ranks and return what they found."""
        self.session.close()
        self.barrier()
        return [(f.code, f.line, f.ranks, f.severity) for f in self.session.all_findings() if f.code != "DC206"]


def add(*numbers):
    total = torch.tensor([float(number) for number in numbers])
    dist.all_reduce(total)  # here
    return total


def reduce(*numbers):
    dist.reduce(torch.tensor(numbers), 0)  # here


def here(function):
    source, first = inspect.getsourcelines(function)
    (found,) = [first + offset for offset, text in enumerate(source) if text.rstrip().endswith("# here")]
    return found


@pytest.mark.parametrize("sum_up", [add, reduce], ids=["all_reduce", "reduce"])
def test_padding_that_is_summed_is_a_note_on_the_line_that_sums(evaluating, sum_up):
    sum_up(17, evaluating.count())
    assert evaluating.found() == [("DC403", here(sum_up), (1,), "note")]
    (finding,) = evaluating.session.all_findings()
    assert finding.message.startswith(
        "61 samples are evaluated, and counted as 62 here: DistributedSampler gives 1 of them twice "
    )


def test_two_evaluations_may_be_summed_together_and_are_told_once(evaluating):
    first, second = evaluating.count(41), evaluating.count(61, shuffle=False)
    add(0.5, first)
    add(0.5, second)
    assert [code for code, *_ in evaluating.found()] == ["DC403"]


@pytest.mark.parametrize(
    "options",
    [
        {"num": 60},
        {"drop_last": True},
        {"steps": True},
        {"left_out": 1},
        {"num": 13},
        {"num_replicas": 1, "rank": 0},
    ],
    ids=["even", "dropped", "training", "left-out", "few", "whole"],
)
def test_what_is_counted_right_is_silent(evaluating, options):
    left_out = {"left_out": evaluating.rank} if "left_out" in options else {}
    add(17, evaluating.count(**{**options, **left_out}))
    assert evaluating.found() == []


def test_other_sums_and_sums_of_later_steps_are_silent(evaluating):
    counted = evaluating.count()
    add(counted + 0.5)
    add(*range(40))
    group = dist.new_group([evaluating.rank], use_local_synchronization=True)
    dist.all_reduce(torch.tensor([float(counted)]), group=group)
    dist.all_reduce(torch.tensor([float(counted)]), op=dist.ReduceOp.MAX)
    evaluating.model(torch.ones(2, 1)).mean().backward()
    evaluating.optimizer.step()
    add(counted)
    assert evaluating.found() == []
