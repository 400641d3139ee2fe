"""What this rank holds of a wrapped model, and the whole of it where the ranks hold parts."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ddpcall.wrappers import Subject


def is_sharded(subject: Subject, parameter: nn.Parameter) -> bool:
    """Say whether this rank holds only a part of a parameter."""
    if subject.spec.flat_parameters:
        return dist.get_world_size() > 1
    placements = getattr(parameter, "placements", ())
    return any(placement.is_shard() for placement in placements) and _mesh_size(parameter) > 1


def _mesh_size(tensor: Any) -> int:
    return tensor.device_mesh.size()


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, or the tensor itself."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def gather_state(subject: Subject, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the whole parameters and the buffers, on every rank. A collective where they are sharded.

    Args:
        subject: The wrapped model.
        parameters: By name, as the optimizer holds them: a sharding wrapper that was called but not left in
            order may have others in the module's place.

    Returns:
        Names as in `inner`; detached copies on the CPU.
    """
    with ExitStack() as stack:
        if subject.spec.flat_parameters:
            fsdp1: Any = type(subject.wrapped)
            stack.enter_context(fsdp1.summon_full_params(subject.wrapped, writeback=False))
        state = {**parameters, **dict(subject.inner.named_buffers())}
        return {name: _whole(value).detach().cpu().clone() for name, value in state.items()}


def local_state(subject: Subject, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return this rank's parameters and buffers as they are, without a copy and without the other ranks.

    Args:
        subject: The wrapped model; none of its parameters sharded.
        parameters: By name, as the optimizer holds them.
    """
    state = {**parameters, **dict(subject.inner.named_buffers())}
    return {name: local_part(value.detach()) for name, value in state.items()}


def _whole(tensor: Tensor) -> Tensor:
    full_tensor: Any = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()
