"""The collectives that the script itself issues: gradients that it reduces by hand are no finding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ddpcall import torch_internals as internals
from ddpcall.taps import Undo, find_tensors, hear_calls, outside_dynamo, undo_all

# DDP's reducer calls the C++ side directly, so these see only calls from Python.
METHODS = (
    "allreduce",
    "allreduce_coalesced",
    "reduce",
    "reduce_scatter",
    internals.REDUCE_SCATTER_BASE.name,
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "allgather",
    internals.ALLGATHER_BASE.name,
    "all_gather_single",
    "all_gather_single_coalesced",
    "broadcast",
    "alltoall",
    "alltoall_base",
    "all_to_all_single",
)
FUNCTIONAL = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "broadcast",
)
FORMERLY = {
    "reduce_scatter_single": "reduce_scatter_tensor",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced",
    "all_gather_single": "all_gather_tensor",
    "all_gather_single_coalesced": "all_gather_into_tensor_coalesced",
}
"""What functional collectives were called before torch 2.13, where the former names call the new ones."""
MAX_RECORDS = 100_000
LEAST_SENT = 1024


@dataclass(frozen=True)
class Mark:
    """A moment in the log: collectives, and elements they were called with, up to then."""

    count: int = 0
    numel: int = 0


class CollectiveLog:
    """What went through the process groups' Python methods and the functional collectives, and when.

    Attributes:
        listeners: Are told of each collective before it runs: its name, and what it was called with.

    Source: `torch/distributed/_functional_collectives.py`, whose functions reach the group from C++.

    Blind to: `torch.ops._c10d_functional` called directly, in compiled code too; other backends' own calls.
    """

    def __init__(self) -> None:
        self.listeners: list[Callable[[str, tuple[Any, ...]], None]] = []
        self._storages: dict[int, int] = {}
        self._now = self._last_step = Mark()
        self._num_steps = self._most_sent = 0

    def attach(self) -> Undo:
        """Watch the process group class and the functional collectives; returns the undo."""
        from torch.distributed import ProcessGroup

        functional = internals.FUNCTIONAL_COLLECTIVES.get(None)
        names = [name if hasattr(functional, name) else FORMERLY.get(name, name) for name in FUNCTIONAL]
        return undo_all(
            # Dynamo traces the functional ones, and none of the group's methods.
            hear_calls(
                owner, name, before=outside_dynamo(partial(self._hear, name)), is_traced=owner is functional
            )
            for owner, its_names in ((ProcessGroup, METHODS), (functional, names))
            for name in its_names
            if hasattr(owner, name)
        )

    def _hear(self, name: str, *args: Any, **kwargs: Any) -> None:
        if not _in_graph_node():
            self.note(tensor for value in args for tensor in find_tensors(value, 3))
            for listener in self.listeners:
                listener(name, args)

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Remember tensors that a collective was called with."""
        if len(self._storages) > MAX_RECORDS:
            self._storages.clear()
        count, numel = self._now.count + 1, self._now.numel
        for tensor in tensors:
            self._storages[tensor.untyped_storage().data_ptr()] = count
            numel += tensor.numel()
        self._now = Mark(count, numel)

    def num_sent(self) -> int:
        """Return how many elements the script has sent since the last optimizer step."""
        return self._now.numel - self._last_step.numel

    def may_average(self, numel: int) -> bool:
        """Say whether what was sent can have kept that many elements equal; what is logged is far less.

        Args:
            numel: Elements that the optimizer steps. A part of them is enough: gradients may be compressed.
        """
        # What is sent before the first step may be the start's broadcast; where there was one step, nothing tells.
        sent = self._now.numel if self._num_steps <= 1 else max(self._most_sent, self.num_sent())
        return self._now.count > 0 and sent > min(numel / 10, LEAST_SENT)

    @property
    def num_called(self) -> int:
        """How many collectives the script has called."""
        return self._now.count

    def mark(self) -> Mark:
        """Return this moment, to ask later what came after it."""
        return self._now

    def covers(self, tensors: list[Tensor], since: Mark | None = None) -> bool:
        """Say whether these tensors went through a collective, themselves or copied into a flat buffer.

        Args:
            tensors: Non-empty; any shapes.
            since: Only what came after it counts; None for the end of the last optimizer step.
        """
        since = since or self._last_step
        sent = self._now.numel - since.numel
        return self.sent(tensors, since) or sent >= sum(tensor.numel() for tensor in tensors)

    def sent(self, tensors: list[Tensor], since: Mark) -> bool:
        """Say whether these tensors themselves went through a collective, each of them."""
        return all(self._storages.get(t.untyped_storage().data_ptr(), 0) > since.count for t in tensors)

    def end_step(self) -> None:
        """Note the end of an optimizer step."""
        if self._num_steps:
            self._most_sent = max(self._most_sent, self.num_sent())
        self._num_steps += 1
        self._last_step = self._now


def find_summed(args: tuple[Any, ...]) -> Tensor | None:
    """Return the one tensor that a process group of all ranks is to sum up, None for anything else.

    Args:
        args: What `ProcessGroup.allreduce` or `ProcessGroup.reduce` was called with.
    """
    group, tensors, *options = args
    if not isinstance(tensors, list) or len(tensors) != 1:
        return None
    is_sum = all(getattr(each, "reduceOp", dist.ReduceOp.SUM) == dist.ReduceOp.SUM for each in options)
    return tensors[0] if is_sum and 1 < group.size() == dist.get_world_size() else None


def _in_graph_node() -> bool:
    """Say whether a node of the graph is running, other than one that hands a parameter its gradient.

    What such a node sends (a differentiable collective, batch statistics) is no reduction of gradients; what a
    parameter's hooks send may be.
    """
    node = internals.autograd_node()
    return node is not None and node.name() != "torch::autograd::AccumulateGrad"
