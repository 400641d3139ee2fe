"""The collectives that the script itself issues: gradients that it reduces by hand are no finding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from ddpcall.taps import Undo, find_tensors, replace_attribute

# DDP's reducer calls the C++ side directly, so these see the script's own calls alone.
METHODS = (
    "allreduce",
    "allreduce_coalesced",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "allgather",
    "_allgather_base",
    "broadcast",
    "alltoall",
    "alltoall_base",
)
MAX_RECORDS = 100_000


class CollectiveLog:
    """What went through the process groups' Python methods since the last optimizer step.

    Blind to: `torch.ops._c10d_functional` and other backends' own calls.
    """

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._storages: set[int] = set()
        self._other_numel = 0

    def attach(self) -> Undo:
        """Watch the process group class; returns the undo."""
        from torch.distributed import ProcessGroup

        with ExitStack() as stack:
            for name in METHODS:
                original = getattr(ProcessGroup, name, None)
                if original is not None:
                    stack.callback(replace_attribute(ProcessGroup, name, self._noting(original)))
            return stack.pop_all().close

    def _noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(group: Any, *args: Any, **kwargs: Any) -> Any:
            self.note(tensor for value in args for tensor in find_tensors(value, 3))
            return original(group, *args, **kwargs)

        return method

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Remember tensors that a collective was called with."""
        for tensor in tensors:
            if len(self._storages) < MAX_RECORDS:
                self._storages.add(tensor.untyped_storage().data_ptr())
            self._other_numel += tensor.numel()

    def covers(self, gradients: list[Tensor]) -> bool:
        """Say whether these gradients went through a collective, themselves or copied into a flat buffer.

        Args:
            gradients: Non-empty; any shapes.
        """
        if all(gradient.untyped_storage().data_ptr() in self._storages for gradient in gradients):
            return True
        return self._other_numel >= sum(gradient.numel() for gradient in gradients)

    def clear(self) -> None:
        """Forget, after an optimizer step."""
        self._storages.clear()
        self._other_numel = 0
