"""DC109 without a matrix: the optimizer holds a copy of the wrapped model, which never moves; look-alikes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddpcall

pytestmark = pytest.mark.ranks(2)


def hand_over(model, copied):
    for own, parameter in zip(copied.parameters(), model.parameters(), strict=True):
        own.grad = parameter.grad.clone()


def copy_back(model, copied):
    with torch.no_grad():
        for own, parameter in zip(copied.parameters(), model.parameters(), strict=True):
            parameter.copy_(own)


def train(rank, tmp_path, make=copy.deepcopy, before=None, after=None, steps=10):
    """Return the codes found where an optimizer steps what `make` gives, and the wrapped model is trained."""
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    with ddpcall.watch(on_finding="record", json=tmp_path / "f.json") as session:
        model, copied = DistributedDataParallel(net), make(net)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
        torch.manual_seed(rank.rank)
        for step in range(steps):
            model.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            if before:
                before(model, copied)
            optimizer.step()
            if after and step % 3 == 2:
                after(model, copied)
    assert session.watched.faults == ()
    rank.barrier()
    return [finding.code for finding in session.all_findings()]


def test_an_optimizer_of_a_copy_is_told_once(rank, tmp_path):
    assert train(rank, tmp_path) == ["DC109"]


@pytest.mark.parametrize(
    "options",
    [
        {"before": hand_over, "after": copy_back},
        {"make": lambda net: nn.Linear(2, 4)},
        {"make": lambda net: nn.ParameterList([torch.zeros(4)])},
        {"make": lambda net: net, "steps": 10},
    ],
    ids=["copied back", "another model", "an input", "its own"],
)
def test_an_optimizer_of_something_else_is_silent(rank, tmp_path, options):
    assert train(rank, tmp_path, **options) == []
