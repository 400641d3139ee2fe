"""The ways a training script reaches its model: the only room that spells `.forward(`.

A *call path* says which object is called and how; a *sync window* says which forwards and backwards stand around
it. On one process every one of them computes the same loss. On two, they train different models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn


class CallPath(StrEnum):
    """How the script reaches the model; `custom` is the user's own function, and not for `invoke`."""

    CALL = "call"
    FORWARD = "forward"
    INNER_CALL = "inner_call"
    INNER_FORWARD = "inner_forward"
    INNER_METHOD = "inner_method"
    SUBMODULES = "submodules"
    FUNCTIONAL = "functional"
    CUSTOM = "custom"


class SyncWindow(StrEnum):
    """What stands around the call: who arms the reducer, and where `no_sync()` is put."""

    PLAIN = "plain"
    WRAPPED_FORWARD_FIRST = "wrapped_forward_first"
    WRAPPED_FORWARD_NO_GRAD_FIRST = "wrapped_forward_no_grad_first"
    NO_SYNC_FORWARD = "no_sync_forward"
    NO_SYNC_BACKWARD = "no_sync_backward"
    NO_SYNC_BOTH = "no_sync_both"
    NO_SYNC_LAST_MICRO_BATCH = "no_sync_last_micro_batch"


class Mode(StrEnum):
    """How the model is set while it runs: train or eval, gradients on or off, precision, seeds."""

    TRAIN = "train"
    SEEDED_BY_RANK = "seeded_by_rank"
    EVAL = "eval"
    EVAL_ON_RANK_0 = "eval_on_rank_0"
    NO_GRAD = "no_grad"
    INFERENCE = "inference"
    AUTOCAST = "autocast"


SPELLING = {
    CallPath.CALL: "wrapped(x)",
    CallPath.FORWARD: "wrapped.forward(x)",
    CallPath.INNER_CALL: "inner(x)",
    CallPath.INNER_FORWARD: "inner.forward(x)",
    CallPath.INNER_METHOD: "inner.compute_loss(x, y)",
    CallPath.SUBMODULES: "for child in inner.children(): x = child(x)",
    CallPath.FUNCTIONAL: "functional_call(inner, parameters, (x,))",
    CallPath.CUSTOM: "your_function(wrapped, inner, x, y)",
}

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """One rank's share of one step.

    Attributes:
        inputs: Shape (batch, *features), on this rank's device.
        targets: Shape (batch,) of class indices, or (batch, outputs) of values.
    """

    inputs: Tensor
    targets: Tensor


def invoke_call(wrapped: nn.Module, inner: nn.Module, batch: Batch, loss: LossFunction) -> Tensor:
    """Compute the loss through `wrapped(x)`."""
    return loss(wrapped(batch.inputs), batch.targets)


def invoke_forward(wrapped: nn.Module, inner: nn.Module, batch: Batch, loss: LossFunction) -> Tensor:
    """Compute the loss through `wrapped.forward(x)`."""
    return loss(wrapped.forward(batch.inputs), batch.targets)


def invoke_inner_call(wrapped: nn.Module, inner: nn.Module, batch: Batch, loss: LossFunction) -> Tensor:
    """Compute the loss through `inner(x)`: what `ddp.module(x)` does."""
    return loss(inner(batch.inputs), batch.targets)


def invoke_inner_forward(wrapped: nn.Module, inner: nn.Module, batch: Batch, loss: LossFunction) -> Tensor:
    """Compute the loss through `inner.forward(x)`."""
    return loss(inner.forward(batch.inputs), batch.targets)


def invoke_inner_method(wrapped: nn.Module, inner: nn.Module, batch: Batch, loss: LossFunction) -> Tensor:
    """Compute the loss through the inner module's own `compute_loss(x, y)`."""
    compute_loss: Any = inner.compute_loss
    return compute_loss(batch.inputs, batch.targets)


def invoke_submodules(wrapped: nn.Module, inner: nn.Module, batch: Batch, loss: LossFunction) -> Tensor:
    """Compute the loss by calling the inner module's children one after the other."""
    outputs = batch.inputs
    for child in inner.children():
        outputs = child(outputs)
    return loss(outputs, batch.targets)


def invoke_functional(wrapped: nn.Module, inner: nn.Module, batch: Batch, loss: LossFunction) -> Tensor:
    """Compute the loss through `torch.func.functional_call` on the inner module's own parameters."""
    state = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
    return loss(torch.func.functional_call(inner, state, (batch.inputs,)), batch.targets)


_INVOKE = {
    CallPath.CALL: invoke_call,
    CallPath.FORWARD: invoke_forward,
    CallPath.INNER_CALL: invoke_inner_call,
    CallPath.INNER_FORWARD: invoke_inner_forward,
    CallPath.INNER_METHOD: invoke_inner_method,
    CallPath.SUBMODULES: invoke_submodules,
    CallPath.FUNCTIONAL: invoke_functional,
}


def invoke(path: CallPath, wrapped: nn.Module, inner: nn.Module, batch: Batch, loss: LossFunction) -> Tensor:
    """Compute the loss of one batch along one call path.

    Args:
        path: The way to reach the model.
        wrapped: The object the training script holds.
        inner: The user's own module under it; the same object where the wrapper works in place.
        batch: This rank's inputs and targets.
        loss: `loss(outputs, targets)`, returning a scalar; `inner_method` uses the model's own instead.

    Returns:
        The scalar loss, shape (), with its autograd graph.

    Raises:
        AttributeError: `inner_method` on a model without `compute_loss`.
    """
    return _INVOKE[path](wrapped, inner, batch, loss)


def split_batch(window: SyncWindow, batch: Batch) -> list[tuple[SyncWindow, Batch]]:
    """Return the micro-batches of a step and the window each of them stands in.

    One for most windows; two for gradient accumulation whose `no_sync()` is off by one: the first micro-batch is
    synchronized and the last is not.
    """
    if window is not SyncWindow.NO_SYNC_LAST_MICRO_BATCH:
        return [(window, batch)]
    halves = zip(batch.inputs.chunk(2), batch.targets.chunk(2), strict=True)
    return list(zip((SyncWindow.PLAIN, SyncWindow.NO_SYNC_BOTH), (Batch(*half) for half in halves), strict=True))


def enter_forward_window(window: SyncWindow, wrapped: nn.Module, batch: Batch) -> AbstractContextManager[Any]:
    """Do what the window puts before the forward, and return the context the forward runs in.

    Args:
        window: The sync window.
        wrapped: A module; the `no_sync` windows need one with a `no_sync()` method, such as DDP.
        batch: The batch that an arming forward is run on.

    Source: `DistributedDataParallel._post_forward` arms the reducer; `no_sync` flips the flag it reads.
    """
    match window:
        case SyncWindow.WRAPPED_FORWARD_FIRST:
            wrapped(batch.inputs)
        case SyncWindow.WRAPPED_FORWARD_NO_GRAD_FIRST:
            with torch.no_grad():
                wrapped(batch.inputs)
        case SyncWindow.NO_SYNC_FORWARD | SyncWindow.NO_SYNC_BOTH:
            return _no_sync(wrapped)
        case _:
            pass
    return contextlib.nullcontext()


def enter_backward_window(window: SyncWindow, wrapped: nn.Module) -> AbstractContextManager[Any]:
    """Return the context the backward runs in."""
    if window in (SyncWindow.NO_SYNC_BACKWARD, SyncWindow.NO_SYNC_BOTH):
        return _no_sync(wrapped)
    return contextlib.nullcontext()


def is_training(mode: Mode, rank: int) -> bool:
    """Say whether a mode puts this rank's model into train mode."""
    return mode is not Mode.EVAL and not (mode is Mode.EVAL_ON_RANK_0 and rank == 0)


def enter_mode(mode: Mode, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context that a mode puts around the forward: gradients off, or autocast to bfloat16."""
    match mode:
        case Mode.NO_GRAD:
            return torch.no_grad()
        case Mode.INFERENCE:
            return torch.inference_mode()
        case Mode.AUTOCAST:
            return torch.autocast(device.type, dtype=torch.bfloat16)
        case _:
            return contextlib.nullcontext()


def _no_sync(wrapped: nn.Module) -> AbstractContextManager[Any]:
    no_sync: Any = wrapped.no_sync
    return no_sync()
