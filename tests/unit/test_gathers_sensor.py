"""What becomes of this rank's part of a tensor that all ranks' tensors are gathered into.

Gloo refuses such a gather of a tensor that requires grad, so the sensor is told of one that NCCL would run.
"""

import pytest
import torch
from torch.overrides import BaseTorchFunctionMode

from ddpcall import torch_internals as internals
from ddpcall.watch.findings_book import FindingsBook
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.gathers import GatherSensor
from tests.watch.test_orders import Silent

RANK, RANKS, NUM = 1, 2, 4


class Group:
    """Two ranks, of which this is the second."""

    def size(self):
        return RANKS

    def rank(self):
        return RANK


@pytest.fixture(params=[internals.ALLGATHER_BASE.name, "all_gather_single"])
def follow(request):
    """Gathers a tensor and returns the one that all ranks' are in; afterwards, whether a gradient was lost."""
    run = Run(FindingsBook(Silent()))
    sensor = GatherSensor(run, lambda: True)

    def gather(x):
        gathered = torch.randn(RANKS * len(x), *x.shape[1:])
        run.collectives.listeners[-1](request.param, (Group(), gathered, x, None))
        return gathered

    def lost(loss):
        x = torch.randn(NUM, 3, requires_grad=True) * 2
        loss(x, gather(x)).backward()
        found = sensor.take()
        assert run.faults == []
        return len(found)

    yield lost
    sensor.take()
    assert internals.NUM_FUNCTION_MODES.get()() == 0


def own(gathered):
    return gathered[RANK * NUM : (RANK + 1) * NUM]


def put_back_in_place(x, gathered):
    own(gathered)[:] = x
    return (x @ gathered.T).mean()


def put_back_in_parts(x, gathered):
    parts = list(gathered.chunk(RANKS))
    parts[RANK] = x
    return (x @ torch.cat(parts).T).mean()


@pytest.mark.parametrize(
    ("loss", "num_lost"),
    [
        (lambda x, gathered: (x @ gathered.T).mean(), 1),
        (lambda x, gathered: (x[:, None] - gathered).square().mean(), 1),
        (lambda x, gathered: (x @ torch.cat(list(gathered.chunk(RANKS))).T).mean(), 1),
        (lambda x, gathered: (x @ own(gathered).T).mean(), 1),
        (lambda x, gathered: (x @ gathered[: RANK * NUM].T).mean(), 0),
        (lambda x, gathered: (x * gathered.mean()).mean(), 0),
        (lambda x, gathered: (x @ gathered.detach().T).mean(), 0),
        (put_back_in_place, 0),
        (put_back_in_parts, 0),
    ],
)
def test_the_own_part_of_one_large_tensor_is_told_from_the_others(follow, loss, num_lost):
    assert follow(loss) == num_lost


def test_modes_that_the_script_enters_and_leaves_stay_its_own(follow):
    def loss(x, gathered):
        with torch.device("cpu"):
            torch.empty(1)
        return (x @ gathered.T).mean()

    with BaseTorchFunctionMode():
        assert follow(loss) == 1
        assert internals.NUM_FUNCTION_MODES.get()() == 1
