"""The sensor of losses: what it counts, and that it changes nothing."""

import linecache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ddpcall.targets import LOSSES
from ddpcall.watch.findings_book import FindingsBook
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.losses import LossSensor


@pytest.fixture
def run():
    publisher: Any = None
    run = Run(FindingsBook(publisher))
    yield run
    assert run.faults == []


@pytest.fixture
def sensor(run):
    sensor = LossSensor(run, lambda: True)
    undo = sensor.attach()
    yield sensor
    undo()
    assert tuple(getattr(F, loss.__name__) for loss in LOSSES) == LOSSES


SCORES = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 2, -100, 1, 1, -100])
INPUTS = {
    "cross_entropy": (SCORES, CLASSES),
    "probabilities": (SCORES, SCORES.softmax(1)),
    "nll_loss": (SCORES.log_softmax(1), CLASSES),
    "binary_cross_entropy": (SCORES.sigmoid(), (SCORES > 0).float()),
    "binary_cross_entropy_with_logits": (SCORES, (SCORES > 0).float()),
}
COUNTS = {"cross_entropy": 4, "nll_loss": 4, "probabilities": 6}


def numbers(sensor):
    return [(count, factor, in_one) for _, count, factor, in_one in sensor.take()]


@pytest.mark.parametrize("name", INPUTS)
def test_targets_of_a_mean_are_counted_and_what_it_is_multiplied_by(sensor, name):
    scores, targets = INPUTS[name]
    scores = scores.clone().requires_grad_()
    loss = getattr(F, name if name != "probabilities" else "cross_entropy")(scores, targets)
    loss /= 4  # in place
    loss.backward()
    assert numbers(sensor) == [(COUNTS.get(name, 18), 0.25, 1)]


def test_the_line_is_the_users_also_through_a_module(sensor):
    scores = SCORES.clone().requires_grad_()
    criterion = nn.CrossEntropyLoss()
    criterion(scores, CLASSES).backward()
    [(place, *_)] = sensor.take()
    file, _, line = place.rpartition(":")
    assert file == __file__
    assert linecache.getline(file, int(line)).strip() == "criterion(scores, CLASSES).backward()"
    assert sensor.sites[place].function == "test_the_line_is_the_users_also_through_a_module"


def test_micro_batches_add_up_and_means_for_one_backward_are_told(sensor):
    scores = SCORES.clone().requires_grad_()
    for _ in range(2):
        torch.stack([F.cross_entropy(scores, CLASSES) for _ in range(3)]).sum().backward()
    assert numbers(sensor) == [(24, 6.0, 3)]


def test_targets_whose_class_weighs_nothing_are_left_out(sensor):
    scores = SCORES.clone().requires_grad_()
    F.cross_entropy(scores, CLASSES, weight=torch.tensor([0.0, 2.0, 1.0])).backward()
    assert numbers(sensor) == [(3, 1.0, 1)]


def test_a_backward_that_reaches_no_parameter_is_not_counted(sensor):
    scores = SCORES.clone().requires_grad_()
    loss = F.cross_entropy(scores, CLASSES)
    sensor.is_paused = True
    torch.autograd.grad(loss, scores, retain_graph=True)
    sensor.is_paused = False
    assert numbers(sensor) == []


def test_what_no_gradient_flows_through_is_not_counted(sensor):
    scores = SCORES.clone().requires_grad_()
    F.cross_entropy(scores, CLASSES)
    F.cross_entropy(scores, CLASSES, reduction="sum").backward()
    with torch.no_grad():
        F.cross_entropy(scores, CLASSES)
    F.cross_entropy(SCORES, CLASSES)
    assert numbers(sensor) == []


def test_nothing_is_seen_between_measured_steps(run):
    sensor = LossSensor(run, lambda: False)
    undo = sensor.attach()
    F.cross_entropy(SCORES.clone().requires_grad_(), CLASSES).backward()
    undo()
    assert numbers(sensor) == []


def test_a_mode_that_calls_the_loss_again_counts_it_once(sensor):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Mode():
        F.cross_entropy(SCORES.clone().requires_grad_(), CLASSES).backward()
    assert numbers(sensor) == [(4, 1.0, 1)]


def test_torch_func_is_left_alone(sensor):
    def loss(scores, target):
        return F.cross_entropy(scores.unsqueeze(0), target.unsqueeze(0))

    torch.func.vmap(torch.func.grad(loss))(SCORES, CLASSES.clamp(min=0))
    assert numbers(sensor) == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
def test_torchscript_compiles_a_loss_as_without_the_sensor(sensor):
    scripted = torch.jit.script(nn.CrossEntropyLoss())
    assert torch.equal(scripted(SCORES, CLASSES), F.cross_entropy(SCORES, CLASSES))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_loss_is_one_graph(sensor, backend):
    torch.compiler.reset()
    compiled = torch.compile(lambda scores: F.cross_entropy(scores, CLASSES), fullgraph=True, backend=backend)
    scores = SCORES.clone().requires_grad_()
    for _ in range(2):
        compiled(scores).backward()
    expected = SCORES.clone().requires_grad_()
    F.cross_entropy(expected, CLASSES).backward()
    assert scores.grad is not None
    assert expected.grad is not None
    assert torch.allclose(scores.grad, 2 * expected.grad)
