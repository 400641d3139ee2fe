"""DC205 of statistics in buffers that nothing sends around, on the line that changes them; what looks alike."""

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddpcall

pytestmark = [pytest.mark.ranks(2), pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")]


class Normalized(nn.Module):
    """A linear layer behind a running mean that is kept in a buffer."""

    mean: torch.Tensor
    update: Callable[[torch.Tensor], None]

    def __init__(self, size=3, **options):
        super().__init__()
        self.register_buffer("mean", torch.full((size,), 0.5), **options)
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        with torch.no_grad():
            self.update(x)
        return self.layer(x - self.mean[:3])


class InPlace(Normalized):
    def update(self, x):
        self.mean.lerp_(x.mean(0), 0.1)  # here


class Assigned(Normalized):
    def update(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)  # here


class Data(Normalized):
    def update(self, x):
        self.mean.data.mul_(0.9).add_(x.mean(0), alpha=0.1)  # here


class Indexed(Normalized):
    def update(self, x):
        self.mean[:] = 0.9 * self.mean + 0.1 * x.mean(0)  # here


class Reduced(Normalized):
    def update(self, x):
        mean = x.mean(0)
        dist.all_reduce(mean)
        self.mean.lerp_(mean / 2, 0.1)


class Queue(Normalized):
    def __init__(self):
        super().__init__(size=60)
        self.at = 3

    def update(self, x):
        self.mean[self.at : self.at + 3] = x[0]
        self.at += 3


class HiddenState(Normalized):
    def update(self, x):
        self.mean.copy_(x[0])


class Constant(Normalized):
    def update(self, x):
        pass


class OfParameters(Normalized):
    def update(self, x):
        self.mean.lerp_(self.layer.weight[0], 0.1)


class Cache(InPlace):
    def __init__(self):
        super().__init__(persistent=False)


class WithBatchNorm(Constant):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return super().forward(self.norm(x))


class Frozen(InPlace):
    def __init__(self):
        super().__init__()
        self.eval()


def reduce_by_hand(model):
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2


def nothing(model):
    pass


def train(rank, model, wrap=None, reduce=reduce_by_hand, steps=9):
    with ddpcall.watch(on_finding="record", every=1) as session:
        torch.manual_seed(0)
        inner = model()
        called = inner if wrap is None else wrap(inner)
        optimizer = torch.optim.SGD(called.parameters(), lr=0.01)
        torch.manual_seed(rank.rank)
        for _ in range(steps):
            optimizer.zero_grad()
            called(torch.randn(8, 3) + 1 + rank.rank).square().mean().backward()
            reduce(inner)
            optimizer.step()
    assert session.watched.faults == ()
    assert torch._C._len_torch_function_stack() == 0
    return [finding for finding in session.findings if finding.code == "DC205"]


def not_sent(model):
    return DistributedDataParallel(model, broadcast_buffers=False)


@pytest.mark.parametrize("model", [InPlace, Assigned, Data, Indexed])
@pytest.mark.parametrize(("wrap", "reduce"), [(None, reduce_by_hand), (not_sent, nothing)], ids=["by hand", "ddp"])
def test_statistics_that_nothing_sends_around_are_found_on_the_line_that_changes_them(rank, model, wrap, reduce):
    found = train(rank, model, wrap, reduce)
    if rank.rank:
        assert found == []
        return
    lines, first = inspect.getsourcelines(model)
    assert [finding.line - first for finding in found] == [
        number for number, line in enumerate(lines) if line.endswith("# here\n")
    ]
    assert found[0].parameters == ("mean",)
    assert (found[0].severity, found[0].step) == ("warning", 2)


RIGHT = [Reduced, Queue, HiddenState, Constant, OfParameters, Cache, WithBatchNorm, Frozen]


@pytest.mark.parametrize("model", RIGHT)
def test_buffers_that_are_equal_or_a_ranks_own_are_silent(rank, model):
    assert train(rank, model) == []


def test_a_model_of_each_ranks_own_is_silent(rank):
    assert train(rank, InPlace, reduce=nothing) == []


def test_buffers_that_ddp_broadcasts_are_silent_where_nobody_uses_them(rank):
    assert train(rank, InPlace, DistributedDataParallel, nothing) == []
