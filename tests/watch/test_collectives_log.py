"""Each collective that a script can call is heard of, once, whatever torch calls it inside."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from ddpcall.watch.sensors.collectives import CollectiveLog

pytestmark = [pytest.mark.ranks(2), pytest.mark.filterwarnings("ignore::FutureWarning")]

CALLS = {
    "all_reduce": lambda x, y: dist.all_reduce(x),
    "broadcast": lambda x, y: dist.broadcast(x, 0),
    "all_gather": lambda x, y: dist.all_gather(list(y.chunk(2)), x),
    "all_gather_into_tensor": lambda x, y: dist.all_gather_into_tensor(y, x),
    "reduce_scatter_tensor": lambda x, y: dist.reduce_scatter_tensor(x, y),
    "reduce_scatter": lambda x, y: dist.reduce_scatter(x, list(y.chunk(2))),
    "all_to_all_single": lambda x, y: dist.all_to_all_single(x, x.clone()),
    "functional all_reduce": lambda x, y: functional.all_reduce(x, "sum", [0, 1]),
    "functional all_gather_tensor": lambda x, y: functional.all_gather_tensor(x, 0, [0, 1]),
    "functional reduce_scatter_tensor": lambda x, y: functional.reduce_scatter_tensor(y, "sum", 0, [0, 1]),
    "functional coalesced": lambda x, y: functional.all_gather_into_tensor_coalesced([x], [0, 1]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_collective_is_heard_of_once_with_what_was_sent(rank, call):
    x, y = torch.randn(4), torch.randn(8)
    log = CollectiveLog()
    undo = log.attach()
    try:
        call(x, y)
    finally:
        undo()
    assert log.num_called == 1
    assert log.covers([x]) or log.covers([y])
