"""The ways a model is prepared: the only room that imports DDP, replicate and torch.compile.

Each `apply_*` takes the user's module and returns a `Subject`: the object a training script would hold, with the
user's own module under it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpcall.paths import CallPath, SyncWindow

CompileBackend = str | Callable[..., Any]


class Wrapper(StrEnum):
    """How a model was prepared. `ddp_of_compile` is `DDP(torch.compile(m))`, and so on."""

    NONE = "none"
    DDP = "ddp"
    REPLICATE = "replicate"
    COMPILE = "compile"
    COMPILE_INPLACE = "compile_inplace"
    DDP_OF_COMPILE = "ddp_of_compile"
    COMPILE_OF_DDP = "compile_of_ddp"
    DDP_COMPILE_INPLACE = "ddp_compile_inplace"


IN_PLACE = frozenset({Wrapper.NONE, Wrapper.REPLICATE, Wrapper.COMPILE_INPLACE})
COMPILING = frozenset(
    {
        Wrapper.COMPILE,
        Wrapper.COMPILE_INPLACE,
        Wrapper.DDP_OF_COMPILE,
        Wrapper.COMPILE_OF_DDP,
        Wrapper.DDP_COMPILE_INPLACE,
    }
)
_WITH_NO_SYNC = frozenset({Wrapper.DDP, Wrapper.DDP_OF_COMPILE, Wrapper.DDP_COMPILE_INPLACE})
_INNER_PATHS = frozenset({CallPath.INNER_CALL, CallPath.INNER_FORWARD})


@dataclass(frozen=True)
class Subject:
    """A wrapped model.

    Attributes:
        wrapper: How it was prepared.
        wrapped: The object the training script holds.
        inner: The user's own module; the very same object as `wrapped` where the wrapper works in place.
    """

    wrapper: Wrapper
    wrapped: nn.Module
    inner: nn.Module


def meaningful_paths(wrapper: Wrapper) -> list[CallPath]:
    """List the call paths that differ under a wrapper: in place, the inner module is the wrapped one."""
    return [path for path in CallPath if not (wrapper in IN_PLACE and path in _INNER_PATHS)]


def meaningful_windows(wrapper: Wrapper) -> list[SyncWindow]:
    """List the sync windows a wrapper can stand in: `no_sync()` is a method of DDP alone."""
    return [window for window in SyncWindow if wrapper in _WITH_NO_SYNC or not window.value.startswith("no_sync")]


def apply_wrapper(
    wrapper: Wrapper,
    model: nn.Module,
    *,
    device: torch.device,
    compile_backend: CompileBackend = "eager",
    **ddp_options: Any,
) -> Subject:
    """Prepare a model, already on its device, the way `wrapper` says.

    Args:
        wrapper: The way.
        model: The user's module; its parameters are broadcast from rank 0 by the DDP wrappers.
        device: Where the model lives; DDP gets it as `device_ids` on CUDA.
        compile_backend: Backend handed to torch.compile by the compiling wrappers.
        **ddp_options: Keyword arguments for DDP's constructor.

    Raises:
        ValueError: No default process group, for wrappers that need one (torch's own error).
    """
    compiling: dict[str, Any] = {"backend": compile_backend}
    wrapped: Any
    match wrapper:
        case Wrapper.NONE:
            wrapped = model
        case Wrapper.DDP:
            wrapped = apply_ddp(model, device, **ddp_options)
        case Wrapper.REPLICATE:
            wrapped = apply_replicate(model, device)
        case Wrapper.COMPILE:
            wrapped = _compile(model, **compiling)
        case Wrapper.COMPILE_INPLACE:
            model.compile(**compiling)
            wrapped = model
        case Wrapper.DDP_OF_COMPILE:
            wrapped = apply_ddp(_compile(model, **compiling), device, **ddp_options)
        case Wrapper.COMPILE_OF_DDP:
            wrapped = _compile(apply_ddp(model, device, **ddp_options), **compiling)
        case Wrapper.DDP_COMPILE_INPLACE:
            wrapped = apply_ddp(model, device, **ddp_options)
            wrapped.compile(**compiling)
    return Subject(wrapper, wrapped, model)


def _compile(model: nn.Module, **options: Any) -> nn.Module:
    compiled: Any = torch.compile(model, **options)
    return compiled


def apply_ddp(model: nn.Module, device: torch.device, **options: Any) -> DistributedDataParallel:
    """Wrap in DistributedDataParallel: the reducer that averages gradients, armed by `DDP.forward`."""
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, **options)


def apply_replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """Apply the hook-based `torch.distributed._composable.replicate`: it arms from forward hooks, in place."""
    from torch.distributed._composable.replicate import replicate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it announces its successor, `replicate_with_fsdp`
        return replicate(model, device_id=device)


def find_reducers(subject: Subject) -> list[DistributedDataParallel]:
    """Return the DDP instances that own the subject's parameters.

    Blind to: `replicate` before its first call; it creates its DDP then (`replicate_state` has the rest).
    """
    found = [module for module in subject.wrapped.modules() if isinstance(module, DistributedDataParallel)]
    state = replicate_state(subject)
    if state is not None and state.has_initialized:
        found.append(state._ddp)
    return found


def replicate_state(subject: Subject) -> Any:
    """Return the state object that `replicate` keeps for the subject, or None."""
    if subject.wrapper is not Wrapper.REPLICATE:
        return None
    from torch.distributed._composable.replicate import replicate

    return replicate.state(subject.wrapped)
