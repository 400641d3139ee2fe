"""Gathers that let no gradient through: what becomes of this rank's own part of the result."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from ddpcall import torch_internals as internals
from ddpcall.taps import (
    CallSite,
    Undo,
    find_call_site,
    find_tensors,
    hear_calls,
    in_backward,
    outside_dynamo,
    undo_all,
)
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.function_modes import put_in, take_out
from ddpcall.watch.sensors.locate import has_compiled

STRATEGIES = tuple(
    f"{package}.strategies.parallel"
    for package in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
)
"""Lightning's modules that have a `ParallelStrategy`."""
_GATHERS = ("allgather", internals.ALLGATHER_BASE.name, "all_gather_single")
_MOST_TRIES = 4
_MOST_CALLS = 20_000


@dataclass(eq=False)
class Gather:
    """One gather of a tensor that requires grad, whose result does not.

    Attributes:
        site: The line.
        shape: Of this rank's tensor.
        num_ranks: How many ranks' tensors came together.
        by_lightning: Whether Lightning gathered it, which has a switch for the gradient.
        first: Address of this rank's own part of the result.
        last: Where it ends.
        storage: Tells whether that memory is the result's still.
        used: Where the own part, or what was computed from it, met a tensor that requires grad.
        is_lost: Whether a backward went through that.
        is_detached: Whether the script itself says that no gradient is to flow back.
    """

    site: CallSite
    shape: tuple[int, ...]
    num_ranks: int
    by_lightning: bool
    first: int
    last: int
    storage: StorageWeakRef
    used: CallSite | None = None
    is_lost: bool = False
    is_detached: bool = False

    @property
    def numel(self) -> int:
        """Elements of this rank's tensor."""
        return torch.Size(self.shape).numel()


class GatherSensor:
    """Follows this rank's own part of a gathered tensor until a backward comes or the step ends.

    The own part alone counts: where it is replaced by the tensor itself, nobody uses it. A result under no_grad,
    of a tensor without grad, that is detached or reduced (a mean for the log) is not followed.

    Args:
        run: What this rank knows; its collectives are heard.
        is_due: Says whether the step that is being prepared is measured.

    Blind to: gathers outside measured steps, in compiled code or once anything was compiled; results that go
    through a `torch.autograd.Function`. Functional collectives have a gradient in every torch from 2.11 on.
    """

    def __init__(self, run: Run, is_due: Callable[[], bool]) -> None:
        self._contain = run.contain
        self._is_due = is_due
        self._tries: dict[CallSite, int] = {}
        self._follower: _Follower | None = None
        self._thread = 0
        self.gathers: list[Gather] = []
        run.collectives.listeners.append(self._hear)

    def attach(self) -> Undo:
        """Hear of `all_gather_object`, whose tensors are copies that nothing else has; returns the undo."""

        def gathered(_: None, object_list: list[Any], obj: Any, group: Any = None) -> None:
            if torch.is_grad_enabled():
                self._contain(self._note_objects, object_list, obj, group)

        owners = (dist, dist.distributed_c10d)
        return undo_all(hear_calls(owner, "all_gather_object", after=gathered) for owner in owners)

    def attach_strategy(self, module: ModuleType) -> Undo:
        """Hear of Lightning's `all_gather`, which gathers under no_grad unless `sync_grads=True`."""

        def gathered(result: Any, _: Any, tensor: Any, group: Any = None, sync_grads: bool = False) -> None:
            if torch.is_grad_enabled() and not sync_grads:
                self._contain(self._note_stacked, tensor, result, group)

        return hear_calls(module.ParallelStrategy, "all_gather", after=gathered)

    def _hear(self, name: str, args: tuple[Any, ...]) -> None:
        if name in _GATHERS and torch.is_grad_enabled():
            self._contain(self._note_call, args)

    def _note_call(self, args: tuple[Any, ...]) -> None:
        group, outputs, inputs = args[:3]
        while isinstance(outputs, list) and len(outputs) == 1 and isinstance(outputs[0], list):
            outputs = outputs[0]
        own = inputs[0] if isinstance(inputs, list) else inputs
        if isinstance(own, Tensor):
            is_listed = isinstance(outputs, list)
            result = outputs[group.rank()] if is_listed else outputs
            self._note(own, result, group, 0 if is_listed else group.rank() * own.numel())

    def _note_objects(self, gathered: list[Any], given: Any, group: Any) -> None:
        group = group or dist.group.WORLD
        copies = find_tensors(gathered[group.rank()], 3) if group.rank() >= 0 else []
        for own, copied in zip(find_tensors(given, 3), copies, strict=False):
            self._note(own, copied, group)

    def _note_stacked(self, given: Any, gathered: Any, group: Any) -> None:
        group = group or dist.group.WORLD
        if isinstance(given, Tensor) and isinstance(gathered, Tensor) and gathered.numel() > given.numel():
            self._note(given, gathered, group, group.rank() * given.numel(), by_lightning=True)

    def _note(self, own: Tensor, result: Tensor, group: Any, offset: int = 0, by_lightning: bool = False) -> None:
        """Follow this rank's part of a result, which begins some elements after the result does."""
        if not own.requires_grad or group.size() == 1 or in_backward() or not self._is_due() or has_compiled():
            return
        site = find_call_site()
        self._tries[site] = self._tries.get(site, 0) + 1
        if self._tries[site] <= _MOST_TRIES:
            first = result.data_ptr() + offset * own.element_size()
            last = first + own.numel() * own.element_size()
            storage = StorageWeakRef(result.untyped_storage())
            self.gathers.append(Gather(site, tuple(own.shape), group.size(), by_lightning, first, last, storage))
            self._follow()

    def _follow(self) -> None:
        if self._follower is None:
            self._follower, self._thread = _Follower(self.gathers, self._contain), threading.get_ident()
            put_in(self._follower)
        self._follower.is_looking = True

    def stop(self) -> None:
        """Look no further at what is computed; what was used is known until `take`."""
        follower = self._follower
        if follower is None:
            return
        follower.is_looking = False
        # `loss.backward()` is a torch function itself, in which the mode is off and comes back afterwards.
        if not follower.depth and threading.get_ident() == self._thread:
            take_out(follower)
            self._follower = None

    def take(self) -> list[Gather]:
        """Return the gathers whose results a backward went through, and forget all."""
        self.stop()
        lost = [gather for gather in self.gathers if gather.is_lost and not gather.is_detached]
        self.gathers.clear()
        return lost


class _Follower(TorchFunctionMode):
    """Sees torch functions that get a gathered part, or what was computed from one.

    Attributes:
        is_looking: Whether it looks; what it is called with it calls in any case.
        depth: How many functions it is calling now.
    """

    def __init__(self, gathers: list[Gather], contain: Callable[..., None]) -> None:
        super().__init__()
        self._gathers = gathers
        self._contain = contain
        self._derived: dict[int, tuple[weakref.ref[Tensor], Gather]] = {}
        self._num_calls = 0
        self.is_looking = True
        self.depth = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, then look at what it got and gave."""
        self.depth += 1
        try:
            outputs = func(*args, **(kwargs or {}))
        finally:
            self.depth -= 1
        self._num_calls += 1
        if self.is_looking and self._num_calls <= _MOST_CALLS and not in_backward():
            self._contain(self._look, func, (args, kwargs), outputs)
        return outputs

    def _look(self, func: Any, inputs: Any, outputs: Any) -> None:
        # A copy that was sent as an object may require grad: of itself, and nothing flows on from there.
        given = [tensor for tensor in find_tensors(inputs, 3) if tensor.is_leaf]
        gather = next((found for tensor in given if (found := self._find(tensor)) is not None), None)
        if gather is None:
            return
        if getattr(func, "__name__", "") in ("detach", "detach_"):
            gather.is_detached = True
            return
        for made in find_tensors(outputs, 2):
            if made.grad_fn is not None and not gather.used:
                gather.used = find_call_site()
                made.grad_fn.register_prehook(outside_dynamo(partial(_note_lost, gather)))
            elif not made.requires_grad and made.is_floating_point() and made.numel() >= gather.numel:
                self._derived |= {id(made): (weakref.ref(made), gather)} if self._is_of(made, given) else {}

    def _find(self, tensor: Tensor) -> Gather | None:
        reference, gather = self._derived.get(id(tensor), (None, None))
        if gather is not None and reference is not None and reference() is tensor:
            return None if gather.is_detached else gather
        if tensor.layout is not torch.strided or type(tensor) not in (Tensor, torch.nn.Parameter):
            return None
        first, last = tensor.data_ptr(), tensor.data_ptr() + _span(tensor)
        living = (each for each in self._gathers if not (each.is_detached or each.storage.expired()))
        return next((each for each in living if first < each.last and each.first < last), None)

    def _is_of(self, made: Tensor, given: list[Tensor]) -> bool:
        """Say whether a tensor has to do with an own part: of a view of a gather's result its addresses tell."""
        storages = {t.untyped_storage().data_ptr() for t in given if id(t) not in self._derived}
        return made.untyped_storage().data_ptr() not in storages or self._find(made) is not None


def _span(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first element to its last."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (sum(steps) + 1) * tensor.element_size() if tensor.numel() else 0


def _note_lost(gather: Gather, gradients: tuple[Tensor | None, ...]) -> None:
    gather.is_lost = gather.is_lost or any(gradient is not None for gradient in gradients)
