"""Statistics that a model keeps in buffers: which of them a step changes, and the lines that do."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ddpcall import torch_internals as internals
from ddpcall.replicas import is_unreadable
from ddpcall.taps import CallSite, find_call_site
from ddpcall.watch.sensors.function_modes import put_in, take_out
from ddpcall.watch.sensors.locate import has_compiled

_MOST_CALLS = 20_000
_MOST_NUMEL = 2**20
_LEAST_COSINE, _LEAST_SHARE = 0.5, 0.5
_NO_WRITE = frozenset({"requires_grad_", "retain_grad_", "detach_"})


@dataclass(frozen=True, eq=False)
class Statistic:
    """One buffer that a training step changed by a part, as a running mean is.

    Attributes:
        module: Its module.
        attribute: Its name there.
        site: The line that changed it first in the step.
    """

    module: weakref.ref[nn.Module]
    attribute: str
    site: CallSite

    def current(self) -> Tensor | None:
        """Return the buffer as it is now."""
        module = self.module()
        return None if module is None else getattr(module, self.attribute, None)


class StatisticsSensor:
    """Looks at one training step: what it does to the persistent buffers that are no batch norm's.

    A buffer counts where most of its elements changed and it still looks as before: statistics move by a part,
    hidden states, noise and queues of samples are replaced.

    Blind to: buffers that are changed in compiled code, or in other steps alone; those of a million elements.
    """

    def __init__(self) -> None:
        self._mode: _WriteMode | None = None
        self._before: list[tuple[nn.Module, str, Tensor]] = []
        self.statistics: list[Statistic] = []

    @property
    def is_looking(self) -> bool:
        """Whether it looks at a step now."""
        return self._mode is not None

    def start(self, roots: Iterable[nn.Module]) -> None:
        """Look from now on, if there are such buffers; call it between two steps."""
        self._before = [(module, name, tensor.clone()) for module, name, tensor in _own_buffers(roots)]
        if self._before and not has_compiled():
            self._mode = _WriteMode(lambda: [getattr(module, name) for module, name, _ in self._before])
            put_in(self._mode)

    def stop(self) -> None:
        """Look no further."""
        mode, self._mode = self._mode, None
        if mode is None:
            return
        take_out(mode)
        for module, name, before in self._before:
            now = getattr(module, name)
            site = mode.find(now)
            if site is not None and _moved_by_a_part(before, now):
                self.statistics.append(Statistic(weakref.ref(module), name, site))
        self._before = []


class _WriteMode(TorchFunctionMode):
    """Notes the lines that write into tensors, and those that made tensors."""

    def __init__(self, list_buffers: Callable[[], list[Tensor]]) -> None:
        super().__init__()
        self._addresses = {tensor.data_ptr() for tensor in list_buffers()}
        self._written: dict[int, CallSite] = {}
        self._made: dict[int, tuple[weakref.ref[Tensor], CallSite]] = {}
        self._num_calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, then note where it wrote."""
        outputs = func(*args, **(kwargs or {}))
        self._num_calls += 1
        if self._num_calls > _MOST_CALLS or getattr(outputs, "requires_grad", False):
            return outputs
        name, first = getattr(func, "__name__", ""), args[0] if args else None
        writes = name == "__setitem__" or (
            name.endswith("_") and not name.endswith("__") and name not in _NO_WRITE
        )
        if writes and isinstance(first, Tensor) and first.data_ptr() in self._addresses:
            self._written.setdefault(first.data_ptr(), find_call_site())
        elif type(outputs) is Tensor and not writes:  # it may be assigned to the buffer's name
            self._made[id(outputs)] = weakref.ref(outputs), find_call_site()
        return outputs

    def find(self, tensor: Tensor) -> CallSite | None:
        """Return the line that wrote into a tensor, or made it."""
        reference, site = self._made.get(id(tensor), (lambda: None, None))
        return site if reference() is tensor else self._written.get(tensor.data_ptr())


def _own_buffers(roots: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for root in roots:
        for module in root.modules():
            is_norm = isinstance(module, internals.NORM_BASE.get(()))
            if is_norm or not module.training:
                continue
            caches = internals.NON_PERSISTENT_BUFFERS.of(module, ())
            for name, tensor in module.named_buffers(recurse=False):
                is_readable = tensor.is_floating_point() and not is_unreadable(tensor)
                if name not in caches and is_readable and 1 < tensor.numel() <= _MOST_NUMEL:
                    yield module, name, tensor


def _moved_by_a_part(before: Tensor, now: Tensor) -> bool:
    if before.shape != now.shape or not bool(now.isfinite().all()):
        return False
    share = float((before != now).float().mean())
    cosine = float(torch.cosine_similarity(before.flatten().double(), now.flatten().double(), dim=0))
    return share >= _LEAST_SHARE and cosine >= _LEAST_COSINE
