"""Models that were wrapped before the watch began, as in a notebook's cell above: watched, and nothing made up."""

import gc
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable import replicate
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ddpcall
from ddpcall.watch.session import Session

pytestmark = pytest.mark.ranks(2, timeout=120)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 2)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Cell:
    """A model that was wrapped and trained, and a watch that begins afterwards."""

    session: Any

    def __init__(
        self,
        rank,
        tmp_path,
        wrap: Callable[..., Any] = DistributedDataParallel,
        model: Any = None,
        steps: int = 2,
        **options: Any,
    ):
        self.rank, self.barrier, self.file = rank.rank, rank.barrier, tmp_path / "f.json"
        torch.manual_seed(0)
        self.inner = model or Net()
        self.model: Any = wrap(self.inner, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        torch.manual_seed(self.rank)
        self.session = None
        self.train(self.model, steps)

    def open(self, **options):
        self.session = ddpcall.watch(on_finding="record", json=self.file, **options)
        return self

    def train(self, model, steps=3):
        for _ in range(steps):
            self.step(model(torch.randn(3, 4)))
        return self

    def step(self, outputs):
        self.optimizer.zero_grad()
        outputs.square().mean().backward()
        self.optimizer.step()
        return self

    def found(self):
        """End the watch on both ranks; return what all have found."""
        self.barrier()
        self.session.close()
        self.barrier()
        assert self.session.not_attached == {}
        return [(finding.code, finding.line) for finding in self.session.all_findings()]


@pytest.fixture(autouse=True)
def no_watch_left():
    """A failed test leaves no watch to the next one."""
    yield
    if Session._running is not None:
        Session._running.close(in_order=False)


def line(test, mark="here"):
    source, first = inspect.getsourcelines(test)
    (found,) = [first + offset for offset, text in enumerate(source) if text.rstrip().endswith(f"# {mark}")]
    return found


# ---- DistributedDataParallel and replicate ----------------------------------------------------------------------


def test_a_bypass_of_an_earlier_wrapper_is_found_on_its_line_in_the_first_step(rank, tmp_path):
    cell = Cell(rank, tmp_path).open()
    for _ in range(3):
        cell.step(cell.inner(torch.randn(3, 4)))  # here
    this = test_a_bypass_of_an_earlier_wrapper_is_found_on_its_line_in_the_first_step
    assert cell.found() == [("DC101", line(this))]
    assert cell.session.findings[0].step == 1


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_an_earlier_wrapper_that_is_called_is_silent(rank, tmp_path, options):
    cell = Cell(rank, tmp_path, **options).open()
    assert cell.train(cell.model).found() == []


def test_a_context_manager_finds_them_too(rank, tmp_path):
    cell = Cell(rank, tmp_path)
    with ddpcall.watch(on_finding="record", json=cell.file) as cell.session:
        cell.step(cell.inner(torch.randn(3, 4)))  # here
        cell.barrier()
    assert cell.found() == [("DC101", line(test_a_context_manager_finds_them_too))]


def test_an_earlier_replicate_is_watched(rank, tmp_path):
    cell = Cell(rank, tmp_path, replicate).open()
    cell.train(cell.model)
    for _ in range(2):
        cell.step(cell.model.forward(torch.randn(3, 4)))  # here
    assert cell.found() == [("DC101", line(test_an_earlier_replicate_is_watched))]


def test_an_earlier_replicate_that_was_never_called_yet_is_watched(rank, tmp_path):
    cell = Cell(rank, tmp_path, replicate, steps=0).open()
    assert cell.train(cell.model).found() == []


def test_a_wrapper_inside_a_users_object_is_found(rank, tmp_path):
    class Trainer(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    cell = Cell(rank, tmp_path)
    trainer = Trainer(cell.model)
    cell.open().step(trainer.model.module(torch.randn(3, 4)))  # here
    assert cell.found() == [("DC101", line(test_a_wrapper_inside_a_users_object_is_found))]


# ---- the watch begins in the middle of a step -------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_watch_that_begins_between_forward_and_backward_is_silent(rank, tmp_path, steps, static):
    cell = Cell(rank, tmp_path, steps=steps, static_graph=static)
    outputs = cell.model(torch.randn(3, 4))
    cell.open().step(outputs)
    assert cell.train(cell.model).found() == []


def test_a_bypass_after_such_a_step_is_found(rank, tmp_path):
    cell = Cell(rank, tmp_path)
    outputs = cell.model(torch.randn(3, 4))
    cell.open().step(outputs)
    cell.step(cell.inner(torch.randn(3, 4)))  # here
    assert cell.found() == [("DC101", line(test_a_bypass_after_such_a_step_is_found))]


def test_of_a_forward_before_the_watch_no_line_is_made_up(rank, tmp_path):
    """Its backward is not judged; the next one is, on the line that is seen."""
    cell = Cell(rank, tmp_path)
    outputs = cell.inner(torch.randn(3, 4))
    cell.open(every=0).step(outputs)
    assert cell.session.findings == []
    cell.step(cell.inner(torch.randn(3, 4)))  # here
    assert cell.found() == [("DC101", line(test_of_a_forward_before_the_watch_no_line_is_made_up))]


def test_a_watch_that_begins_between_backward_and_step_is_silent(rank, tmp_path):
    cell = Cell(rank, tmp_path)
    cell.optimizer.zero_grad()
    cell.model(torch.randn(3, 4)).sum().backward()
    cell.open()
    cell.optimizer.step()
    assert cell.train(cell.model).found() == []


def test_a_watch_that_begins_inside_an_accumulation_is_silent(rank, tmp_path):
    cell = Cell(rank, tmp_path)
    cell.optimizer.zero_grad()
    with cell.model.no_sync():
        cell.model(torch.randn(3, 4)).sum().backward()
        cell.open()
        cell.model(torch.randn(3, 4)).sum().backward()
    cell.model(torch.randn(3, 4)).sum().backward()
    cell.optimizer.step()
    assert cell.train(cell.model).found() == []


def test_a_reducer_that_was_armed_averages_a_bypass_too(rank, tmp_path):
    cell = Cell(rank, tmp_path)
    cell.model(torch.randn(3, 4))
    cell.open().step(cell.inner(torch.randn(3, 4)))
    assert cell.found() == []


# ---- what was frozen and unfrozen before ------------------------------------------------------------------------


def test_a_parameter_that_is_frozen_when_the_watch_begins_is_the_reducers(rank, tmp_path):
    cell = Cell(rank, tmp_path, find_unused_parameters=True)
    cell.inner.second.requires_grad_(False)
    cell.open().train(cell.model)
    cell.inner.second.requires_grad_(True)
    assert cell.train(cell.model).found() == []


def test_a_parameter_that_was_unfrozen_before_the_watch_began_is_no_reducers(rank, tmp_path):
    """Where it was unfrozen is not known, so the line is the step's and the text does not say "here"."""
    net = Net()
    net.first.requires_grad_(False)
    cell = Cell(rank, tmp_path, model=net)
    net.first.requires_grad_(True)
    cell.open().train(cell.model, 1)
    assert [code for code, _ in cell.found()] == ["DC102"]
    (finding,) = cell.session.findings
    assert sorted(finding.parameters) == ["first.bias", "first.weight"]
    assert "after wrapping, here" not in finding.message
    assert "before the watch" in finding.message


# ---- several, and older ones ------------------------------------------------------------------------------------


def test_a_second_watch_finds_what_the_first_did(rank, tmp_path):
    cell = Cell(rank, tmp_path).open()
    assert cell.train(cell.model).found() == []
    cell.file = tmp_path / "second.json"
    cell.open()
    for _ in range(2):
        cell.step(cell.inner(torch.randn(3, 4)))  # here
    assert cell.found() == [("DC101", line(test_a_second_watch_finds_what_the_first_did))]


def test_a_model_of_yesterday_whose_replicas_differ_is_not_compared(rank, tmp_path):
    yesterday = Cell(rank, tmp_path)
    yesterday.train(yesterday.inner)
    today = Cell(rank, tmp_path).open()
    assert today.train(today.model).found() == []


def test_a_model_whose_replicas_differ_already_is_told(rank, tmp_path):
    cell = Cell(rank, tmp_path)
    cell.train(cell.inner)
    cell.open()
    assert cell.train(cell.model).found() == [("DC201", 0)]


def test_two_models_are_compared_in_the_same_order_on_all_ranks(rank, tmp_path):
    """The garbage collector lists them as it likes."""
    first = Cell(rank, tmp_path, steps=0)
    if rank.rank == 0:
        gc.collect()
    second = Cell(rank, tmp_path, steps=0)
    nn.init.zeros_(second.inner.first.weight)
    for parameters in zip(second.inner.parameters(), strict=True):
        dist.broadcast(parameters[0].detach(), 0)
    if rank.rank == 1:
        gc.collect(0)
    first.open()
    for _ in range(3):
        second.train(second.model, 1)
        first.train(first.model, 1)
    assert first.found() == []


def test_a_model_wrapped_twice_is_silent_with_either(rank, tmp_path):
    cell = Cell(rank, tmp_path)
    again = DistributedDataParallel(cell.inner)
    cell.open().train(again)
    assert cell.train(cell.model).train(again).found() == []


def test_a_model_of_a_group_that_is_gone_is_left_alone(rank, tmp_path):
    cell = Cell(rank, tmp_path, process_group=dist.new_group([0, 1]))
    dist.destroy_process_group(cell.model.process_group)
    cell.open()
    assert cell.found() == []


# ---- fully_shard ------------------------------------------------------------------------------------------------


def shard(model):
    fully_shard(model.first)
    return fully_shard(model)


def test_an_earlier_fully_shard_is_silent(rank, tmp_path):
    cell = Cell(rank, tmp_path, shard).open()
    assert cell.train(cell.model).found() == []


def test_an_earlier_fully_shard_is_silent_between_forward_and_backward(rank, tmp_path):
    cell = Cell(rank, tmp_path, shard)
    outputs = cell.model(torch.randn(3, 4))
    cell.open().step(outputs)
    assert cell.train(cell.model).found() == []


def test_a_forward_past_an_earlier_fully_shard_is_found(rank, tmp_path):
    cell = Cell(rank, tmp_path, fully_shard).open(every=0)
    with torch.no_grad():
        cell.model(torch.randn(3, 4))  # leaves the parameters gathered
    cell.inner.forward(torch.randn(3, 4)).sum().backward()  # here
    cell.optimizer.step()
    assert cell.found() == [("DC306", line(test_a_forward_past_an_earlier_fully_shard_is_found))]


def test_synchronization_that_was_switched_off_earlier_has_no_line(rank, tmp_path):
    cell = Cell(rank, tmp_path, shard)
    cell.model.set_requires_gradient_sync(False)
    cell.open(every=0).train(cell.model, 1)
    assert cell.found() == [("DC104", 0)]
