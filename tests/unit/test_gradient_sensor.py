"""Which steps are measured: those that are due, and a bounded number of others."""

from typing import Any

import pytest
import torch

from ddpcall.watch.findings_book import FindingsBook
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.gradients import MOST_ASKED, GradientSensor

NUMEL = 4


@pytest.fixture
def sensor():
    nobody: Any = None
    made = GradientSensor(Run(FindingsBook(nobody)), 10, list, lambda step, optimizer, record: None)
    made._numel = NUMEL
    return made


def ask(sensor):
    sensor.ask()


def send(sensor):
    sensor._run.collectives.note([torch.ones(NUMEL)])


def train(sensor, steps, before):
    """Take steps of two backwards each; return those that were measured and are not due anyway."""
    measured = []
    for step in steps:
        before(sensor)
        if [sensor.is_due(step), sensor.is_due(step)] == [True, True]:
            measured.append(step)
        sensor._run.collectives.end_step()
    return [step for step in measured if step > 16 and step & (step - 1) and step % 1000]


@pytest.mark.parametrize("before", [ask, send])
def test_sixteen_steps_are_measured_for_a_reason_and_none_after(sensor, before):
    assert train(sensor, range(1, 16), before) == [], "they are measured in any case"
    asked = train(sensor, range(16, 200), before)
    assert len(asked) == MOST_ASKED
    assert asked == [*range(17, 32), 33], "the 32nd is due"
    assert train(sensor, range(200, 400), before) == []


def test_neither_bound_uses_up_the_other(sensor):
    sent = train(sensor, range(17, 60), send)
    asked = train(sensor, range(60, 120), ask)
    assert (len(sent), len(asked)) == (MOST_ASKED, MOST_ASKED)


def test_what_is_sent_before_a_step_that_is_due_leaves_the_bound_alone(sensor):
    assert train(sensor, range(1, 17), send) == []
    assert len(train(sensor, range(17, 60), send)) == MOST_ASKED


def test_less_than_the_weights_is_no_reason(sensor):
    assert train(sensor, range(17, 60), lambda each: each._run.collectives.note([torch.ones(NUMEL - 1)])) == []
