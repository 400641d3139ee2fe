"""A traceback under the watch is the one without it, whatever of torch the watch stands around."""

import subprocess
import sys
import traceback
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddpcall
from ddpcall.watch.program.tracebacks import drop_own_frames
from tests.ranks.lab_process import clean_environment


class FailingBackward(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx, inputs):
        """Return a copy."""
        return inputs.clone()

    @staticmethod
    def backward(ctx, *gradients):
        """Raise."""
        raise RuntimeError("in the backward")


def backward():
    model = DistributedDataParallel(nn.Linear(2, 2))
    FailingBackward.apply(model(torch.ones(1, 2))).sum().backward()


def backward_in_c():
    loss = nn.Linear(2, 2)(torch.ones(1, 2)).sum()
    loss.backward()
    loss.backward()


def backward_of_a_backward():
    try:
        backward()
    except RuntimeError as error:
        raise ValueError("raised from the other") from error


def group_of_backwards():
    errors = []
    for fault in (backward, backward_in_c):
        try:
            fault()
        except RuntimeError as error:
            errors.append(error)
    raise ExceptionGroup("both", errors)


def taken_gradient():
    torch.autograd.grad(nn.Linear(2, 2)(torch.ones(1, 2)).sum(), [torch.ones(1, requires_grad=True)])


def wrapping():
    DistributedDataParallel(nn.Identity())


def loading():
    nn.Linear(2, 2).load_state_dict({"other": torch.ones(1)})


def making_an_optimizer():
    torch.optim.SGD([], lr=0.1)


def collective_in_c():
    dist.broadcast(torch.ones(1), 99)


FAULTS = (
    backward,
    backward_in_c,
    backward_of_a_backward,
    group_of_backwards,
    taken_gradient,
    wrapping,
    loading,
    making_an_optimizer,
    collective_in_c,
)


@pytest.fixture
def world_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fail(fault: Callable[[], None]) -> BaseException:
    try:
        fault()
    except Exception as error:  # whichever it is
        return error
    raise AssertionError("nothing was raised")


def text_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_no_frame_of_the_watch_is_left_and_no_other_is_lost(fault, world_of_one):
    bare = text_of(fail(fault))
    with ddpcall.watch(on_finding="record"):
        error = fail(fault)
    assert "/ddpcall/" in text_of(error)
    drop_own_frames(error)
    assert text_of(error) == bare


def test_what_the_watch_raises_itself_keeps_its_frames():
    def watch_twice():
        with ddpcall.watch():
            pass

    with ddpcall.watch(on_finding="record"):
        error = fail(watch_twice)
    before = text_of(error)
    drop_own_frames(error)
    assert 'watch/session.py", line' in before
    assert text_of(error) == before


def test_a_training_that_fails_in_a_backward_prints_what_it_prints_without_the_watch(tmp_path):
    (tmp_path / "fail.py").write_text(
        "import torch\nloss = torch.nn.Linear(2, 2)(torch.ones(1, 2)).sum()\nloss.backward()\nloss.backward()\n"
    )

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command, "fail.py"],
            cwd=tmp_path,
            env=clean_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 1
        return done.stderr

    bare = run()
    assert "backward through the graph a second time" in bare
    answer = "nothing could be found out: fail.py ended with RuntimeError before its first optimizer step"
    assert run("-m", "ddpcall", "watch") == f"{bare}ddpcall watch: {answer}\n"
