"""The ways a model is prepared: the only room that imports DDP, FSDP, torch.compile, accelerate and the like.

One `apply_*` a wrapper. Each takes the user's module and returns what a training script would hold;
`apply_wrapper` puts that beside the user's own module, in a `Subject`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ddpcall import torch_internals as internals
from ddpcall.paths import CallPath, SyncWindow
from ddpcall.reductions import (
    average_parameters_periodically,
    average_with_neighbors,
    drop_last_rank,
    sum_gradients,
)

CompileBackend = str | Callable[..., Any]


class Wrapper(StrEnum):
    """How a model was prepared. `ddp_of_compile` is `DDP(torch.compile(m))`, and so on."""

    NONE = "none"
    DDP = "ddp"
    DDP_STATIC_GRAPH = "ddp_static_graph"
    DDP_FIND_UNUSED = "ddp_find_unused"
    DDP_BUCKET_VIEW = "ddp_bucket_view"
    DDP_COMM_HOOK = "ddp_comm_hook"
    DDP_LOCAL_BUFFERS = "ddp_local_buffers"
    DDP_BUFFERS_AFTER = "ddp_buffers_after"
    DDP_JOIN = "ddp_join"
    DDP_JOIN_UNEVEN = "ddp_join_uneven"
    DDP_PYTHON_REDUCER = "ddp_python_reducer"
    DDP_SUMMED = "ddp_summed"
    DDP_GROUPS = "ddp_groups"
    DDP_DROPPED_RANK = "ddp_dropped_rank"
    DDP_RING = "ddp_ring"
    DDP_POWERSGD = "ddp_powersgd"
    LOCAL_SGD = "local_sgd"
    REPLICATE = "replicate"
    REPLICATE_WITH_FSDP = "replicate_with_fsdp"
    FSDP1 = "fsdp1"
    FSDP2 = "fsdp2"
    FSDP2_LAYERS = "fsdp2_layers"
    FSDP2_REGISTERED = "fsdp2_registered"
    FSDP2_HYBRID_INNER = "fsdp2_hybrid_inner"
    TP = "tp"
    COMPILE = "compile"
    COMPILE_AOT_EAGER = "compile_aot_eager"
    COMPILE_INDUCTOR = "compile_inductor"
    COMPILE_INPLACE = "compile_inplace"
    DDP_OF_COMPILE = "ddp_of_compile"
    COMPILE_OF_DDP = "compile_of_ddp"
    DDP_COMPILE_INPLACE = "ddp_compile_inplace"
    ACCELERATE = "accelerate"
    ACCELERATE_BF16 = "accelerate_bf16"
    ACCELERATE_UNWRAPPED = "accelerate_unwrapped"
    ACCELERATE_STRIPPED = "accelerate_stripped"
    FABRIC = "fabric"
    DATA_PARALLEL = "data_parallel"
    SCRIPT = "script"
    TRACE = "trace"
    EXPORT = "export"
    CUSTOM = "custom"  # the user's own function; not for `apply_wrapper`


IN_PLACE = frozenset({
    Wrapper.NONE, Wrapper.LOCAL_SGD, Wrapper.REPLICATE, Wrapper.REPLICATE_WITH_FSDP, Wrapper.FSDP2,
    Wrapper.FSDP2_LAYERS, Wrapper.FSDP2_REGISTERED, Wrapper.FSDP2_HYBRID_INNER, Wrapper.TP,
    Wrapper.COMPILE_INPLACE,
})  # fmt: skip
COMPILING = frozenset({
    Wrapper.COMPILE, Wrapper.COMPILE_AOT_EAGER, Wrapper.COMPILE_INDUCTOR, Wrapper.COMPILE_INPLACE,
    Wrapper.DDP_OF_COMPILE, Wrapper.COMPILE_OF_DDP, Wrapper.DDP_COMPILE_INPLACE,
})  # fmt: skip
# Nothing in these joins what different ranks learn from different batches.
WITHOUT_DATA_PARALLELISM = frozenset({
    Wrapper.NONE, Wrapper.TP, Wrapper.COMPILE, Wrapper.COMPILE_AOT_EAGER, Wrapper.COMPILE_INDUCTOR,
    Wrapper.COMPILE_INPLACE, Wrapper.DATA_PARALLEL, Wrapper.SCRIPT, Wrapper.TRACE, Wrapper.EXPORT,
})  # fmt: skip
# Every rank holds a part of one model, so all of them must be given the same batch.
SAME_BATCH = frozenset({Wrapper.TP})
# The last rank has fewer batches than the others.
UNEVEN_INPUTS = frozenset({Wrapper.DDP_JOIN_UNEVEN})
# These reduce without DDP's C++ reducer, or by other means than all-reduces over all ranks: the taps on that one
# say nothing about them.
OWN_REDUCER = frozenset({
    Wrapper.DDP_GROUPS, Wrapper.LOCAL_SGD, Wrapper.DDP_PYTHON_REDUCER,
    Wrapper.REPLICATE_WITH_FSDP, Wrapper.FSDP1, Wrapper.FSDP2, Wrapper.FSDP2_LAYERS, Wrapper.FSDP2_REGISTERED,
    Wrapper.FSDP2_HYBRID_INNER, Wrapper.TP, Wrapper.CUSTOM,
})  # fmt: skip
_COMPILE_BACKENDS = {Wrapper.COMPILE_AOT_EAGER: "aot_eager", Wrapper.COMPILE_INDUCTOR: "inductor"}
_WITH_NO_SYNC = frozenset(
    wrapper
    for wrapper in Wrapper
    if wrapper.startswith(("ddp", "accelerate", "fsdp1")) and not wrapper.startswith("ddp_join")
)
_INNER_PATHS = frozenset({CallPath.INNER_CALL, CallPath.INNER_FORWARD})


class WrapperMissing(RuntimeError):
    """The wrapper belongs to a package, or a version of torch, that is not installed here."""


@dataclass(frozen=True)
class Subject:
    """A wrapped model.

    Attributes:
        wrapper: How it was prepared.
        wrapped: The object the training script holds.
        inner: The user's own module; the very same object as `wrapped` where the wrapper works in place.
        session: What a script puts around its training loop for this wrapper: a `Join`, a setting of dynamo's.
        prepare_optimizer: What it puts around its optimizer; returns what has `step()` and `zero_grad()`.
    """

    wrapper: Wrapper
    wrapped: nn.Module
    inner: nn.Module
    session: Callable[[], AbstractContextManager[Any]] = nullcontext
    prepare_optimizer: Callable[[Optimizer], Any] = lambda optimizer: optimizer


@dataclass(frozen=True)
class Settings:
    """What wrappers may need beside the module.

    Attributes:
        device: Where the model lives; DDP gets it as `device_ids` on CUDA.
        compile_backend: Backend handed to torch.compile by the compiling wrappers.
        ddp: Keyword arguments for DDP's constructor.
        example: One rank's inputs of one step, for wrappers that record a call: shape (batch, *features).
    """

    device: torch.device
    compile_backend: CompileBackend = "eager"
    ddp: dict[str, Any] = field(default_factory=dict)
    example: Tensor | None = None


def meaningful_paths(wrapper: Wrapper) -> list[CallPath]:
    """List the call paths that differ under a wrapper: in place, the inner module is the wrapped one."""
    return [path for path in CallPath if not (wrapper in IN_PLACE and path in _INNER_PATHS)]


def meaningful_windows(wrapper: Wrapper) -> list[SyncWindow]:
    """List the sync windows a wrapper can stand in: `no_sync()` is a method of DDP and FSDP1 alone."""
    return [window for window in SyncWindow if wrapper in _WITH_NO_SYNC or not window.value.startswith("no_sync")]


def choose_compile_backend(wrapper: Wrapper, configured: str) -> str:
    """Return the compile backend that a wrapper's name fixes, or else the configured one."""
    return _COMPILE_BACKENDS.get(wrapper, configured)


def apply_wrapper(
    wrapper: Wrapper,
    model: nn.Module,
    *,
    device: torch.device,
    compile_backend: CompileBackend = "eager",
    example: Tensor | None = None,
    **ddp_options: Any,
) -> Subject:
    """Prepare a model, already on its device, the way `wrapper` says.

    Args:
        wrapper: The way.
        model: The user's module; its parameters are broadcast from rank 0 by the DDP wrappers.
        device: Where the model lives; DDP gets it as `device_ids` on CUDA.
        compile_backend: Backend handed to torch.compile by the compiling wrappers.
        example: One rank's inputs of one step; `trace` and `export` record a call with them.
        **ddp_options: Keyword arguments for DDP's constructor.

    Raises:
        WrapperMissing: The package or torch feature behind the wrapper is not installed.
        ValueError: No default process group, for wrappers that need one (torch's own error).
    """
    wrapped = _APPLY[wrapper](model, Settings(device, compile_backend, ddp_options, example))
    session = _SESSIONS.get(wrapper, nullcontext)
    if wrapper in (Wrapper.DDP_JOIN, Wrapper.DDP_JOIN_UNEVEN):
        return Subject(wrapper, wrapped, model, lambda: _join(wrapped))
    if wrapper is Wrapper.LOCAL_SGD:
        return Subject(wrapper, wrapped, model, session, average_parameters_periodically)
    return Subject(wrapper, wrapped, model, session)


def apply_none(model: nn.Module, settings: Settings) -> nn.Module:
    """Leave the model as it is."""
    return model


def apply_ddp(model: nn.Module, settings: Settings, **options: Any) -> DistributedDataParallel:
    """Wrap in DistributedDataParallel: the reducer that averages gradients, armed by `DDP.forward`."""
    device_ids = [settings.device] if settings.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, **(options | settings.ddp))


def apply_ddp_static_graph(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP that expects the same graph in every step."""
    return apply_ddp(model, settings, static_graph=True)


def apply_ddp_find_unused(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP that searches each forward's graph for parameters without a part in it."""
    return apply_ddp(model, settings, find_unused_parameters=True)


def apply_ddp_bucket_view(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP whose gradients are views into the communication buckets."""
    return apply_ddp(model, settings, gradient_as_bucket_view=True)


def apply_ddp_comm_hook(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP with a communication hook: gradients travel as float16."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    return _with_comm_hook(apply_ddp(model, settings), fp16_compress_hook)


def apply_ddp_local_buffers(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP that leaves each rank its own buffers; torch 2.13 renamed the argument."""
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return apply_ddp(model, settings, **{name: False})


def apply_ddp_buffers_after(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP that sends rank 0's buffers after the forward instead of before it.

    Source: `torch/nn/parallel/distributed.py`, `_register_buffer_comm_hook` (private; no public way exists).
    """
    location = _private(internals.BUFFER_COMM_HOOK_LOCATION).POST_FORWARD
    ddp = apply_ddp(model, settings)
    internals.REGISTER_BUFFER_COMM_HOOK.of(ddp)(None, _send_buffers_of_rank_0, location)
    return ddp


def _send_buffers_of_rank_0(_: Any, buffers: dict[str, Tensor]) -> None:
    for buffer in buffers.values():
        dist.broadcast(buffer, src=0)


def apply_ddp_summed(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP with a communication hook that sums gradients over the ranks and does not divide."""
    return _with_comm_hook(apply_ddp(model, settings), sum_gradients)


def apply_ddp_dropped_rank(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP with a communication hook to which the last rank contributes zeros."""
    return _with_comm_hook(apply_ddp(model, settings), drop_last_rank)


def apply_ddp_ring(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP with a communication hook that averages with the two neighbors on a ring, as gossip SGD does."""
    return _with_comm_hook(apply_ddp(model, settings), average_with_neighbors)


def apply_ddp_powersgd(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP with PowerSGD's communication hook: from the third step on, gradients travel as rank 1."""
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    state = PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    return _with_comm_hook(apply_ddp(model, settings), powerSGD_hook, state)


def _with_comm_hook(ddp: DistributedDataParallel, hook: Any, state: object = None) -> DistributedDataParallel:
    ddp.register_comm_hook(state, hook)
    return ddp


def apply_ddp_groups(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP over a process group of half the ranks: two halves that never meet."""
    return apply_ddp(model, settings, process_group=_halves(settings).get_group("inner"))


def apply_local_sgd(model: nn.Module, settings: Settings) -> nn.Module:
    """Leave the model as it is and average parameters, not gradients, after every fourth step: local SGD."""
    return model


def apply_ddp_python_reducer(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP with its reducer in Python, which dynamo can trace: gradient hooks that all-reduce.

    Source: `torch/nn/parallel/distributed.py`, `_register_accum_grad_hook`.
    """
    with _python_reducer():
        return apply_ddp(model, settings)


@contextmanager
def _python_reducer() -> Iterator[None]:
    """Choose the python reducer; DDP's constructor then changes inductor's settings, which are put back."""
    dynamo_config, inductor_config = map(_private, internals.COMPILER_CONFIGS.values())
    before = inductor_config.save_config_portable()
    with dynamo_config.patch(optimize_ddp="python_reducer"):
        try:
            yield
        finally:
            inductor_config.load_config(before)


@contextmanager
def _join(ddp: Any) -> Iterator[None]:
    from torch.distributed.algorithms.join import Join

    with Join([ddp]):
        yield


def _private(name: internals.Private) -> Any:
    """Return what a private name of torch stands for; a wrapper that needs one that is gone is missing."""
    try:
        return name.get()
    except internals.TorchNameMissing as error:
        raise WrapperMissing(str(error)) from None


def apply_replicate(model: nn.Module, settings: Settings) -> nn.Module:
    """Apply the hook-based `torch.distributed._composable.replicate`: it arms from forward hooks, in place."""
    replicate = _private(internals.REPLICATE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it announces its successor, `replicate_with_fsdp`
        return replicate(model, device_id=settings.device)


def apply_replicate_with_fsdp(model: nn.Module, settings: Settings) -> nn.Module:
    """Apply `replicate` as FSDP2 does it: parameters are replicated DTensors, gathered by forward-pre hooks."""
    replicated: Any = _private(internals.REPLICATE_WITH_FSDP)(model, mesh=_mesh(settings))
    return replicated


def apply_fsdp1(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in FullyShardedDataParallel, the first FSDP, with the user's own parameters as views."""
    try:
        from torch.distributed.fsdp import FullyShardedDataParallel
    except ImportError as error:
        raise WrapperMissing("torch no longer has FullyShardedDataParallel; write wrapper=fsdp2") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it announces fully_shard
        return FullyShardedDataParallel(model, device_id=settings.device, use_orig_params=True)


def apply_fsdp2(model: nn.Module, settings: Settings) -> nn.Module:
    """Apply `fully_shard` to the root alone: the root's hooks gather every parameter."""
    from torch.distributed.fsdp import fully_shard

    sharded: Any = fully_shard(model, mesh=_mesh(settings))
    return sharded


def apply_fsdp2_layers(model: nn.Module, settings: Settings) -> nn.Module:
    """Apply `fully_shard` to every child that has parameters, then to the root, as its documentation advises."""
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(settings)
    for child in model.children():
        if next(child.parameters(), None) is not None:
            fully_shard(child, mesh=mesh)
    sharded: Any = fully_shard(model, mesh=mesh)
    return sharded


def apply_fsdp2_registered(model: nn.Module, settings: Settings) -> nn.Module:
    """Apply `fully_shard` to the root and register `forward` and `compute_loss` as ways in."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    sharded = apply_fsdp2(model, settings)
    for name in ("forward", "compute_loss"):
        if hasattr(sharded, name):
            register_fsdp_forward_method(sharded, name)
    return sharded


def apply_fsdp2_hybrid_inner(model: nn.Module, settings: Settings) -> nn.Module:
    """Apply `fully_shard` over the inner dim of a hybrid mesh alone, without the reduction over the outer one."""
    from torch.distributed.fsdp import fully_shard

    sharded: Any = fully_shard(model, mesh=_halves(settings)["inner"])
    return sharded


def apply_tp(model: nn.Module, settings: Settings) -> nn.Module:
    """Split the first two linear layers over the ranks: the first by columns, the second by rows."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    plan: dict[str, Any] = dict(zip(linear, (ColwiseParallel(), RowwiseParallel()), strict=False))
    return parallelize_module(model, _mesh(settings), plan)


def _mesh(settings: Settings) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(settings.device.type, (dist.get_world_size(),))


def _halves(settings: Settings) -> Any:
    """Return a mesh of two halves where the ranks can be halved, else of one whole."""
    from torch.distributed.device_mesh import init_device_mesh

    num_ranks = dist.get_world_size()
    shape = (2, num_ranks // 2) if num_ranks % 2 == 0 and num_ranks > 2 else (1, num_ranks)
    return init_device_mesh(settings.device.type, shape, mesh_dim_names=("outer", "inner"))


def apply_compile(model: nn.Module, settings: Settings) -> nn.Module:
    """Return what `torch.compile(model)` returns: a new object around the model."""
    compiled: Any = torch.compile(model, backend=settings.compile_backend)
    return compiled


def apply_compile_with_backend(model: nn.Module, settings: Settings) -> nn.Module:
    """Return what `torch.compile(model)` returns, with the backend that the wrapper's name ends in."""
    return apply_compile(model, settings)


def apply_compile_inplace(model: nn.Module, settings: Settings) -> nn.Module:
    """Compile the model's own `__call__` with `model.compile()`."""
    model.compile(backend=settings.compile_backend)
    return model


def apply_ddp_of_compile(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap the compiled model in DDP."""
    return apply_ddp(apply_compile(model, settings), settings)


def apply_compile_of_ddp(model: nn.Module, settings: Settings) -> nn.Module:
    """Compile the DDP-wrapped model."""
    return apply_compile(apply_ddp(model, settings), settings)


def apply_ddp_compile_inplace(model: nn.Module, settings: Settings) -> nn.Module:
    """Compile the `__call__` of the DDP object in place."""
    return apply_compile_inplace(apply_ddp(model, settings), settings)


def apply_accelerate(model: nn.Module, settings: Settings) -> nn.Module:
    """Hand the model to `Accelerator().prepare`: DDP, and nothing else in full precision."""
    return _prepare(model, settings, "no")[1]


def apply_accelerate_bf16(model: nn.Module, settings: Settings) -> nn.Module:
    """Hand the model to `Accelerator(mixed_precision="bf16")`: DDP, and autocast patched into inner.forward."""
    return _prepare(model, settings, "bf16")[1]


def apply_accelerate_unwrapped(model: nn.Module, settings: Settings) -> nn.Module:
    """Prepare in bf16 and call `unwrap_model(prepared)` once, as scripts do to save."""
    accelerator, prepared = _prepare(model, settings, "bf16")
    accelerator.unwrap_model(prepared)
    return prepared


def apply_accelerate_stripped(model: nn.Module, settings: Settings) -> nn.Module:
    """Prepare in bf16 and call `unwrap_model(prepared, keep_fp32_wrapper=False)` once."""
    accelerator, prepared = _prepare(model, settings, "bf16")
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    return prepared


def _prepare(model: nn.Module, settings: Settings, mixed_precision: str) -> tuple[Any, nn.Module]:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise WrapperMissing("accelerate is not installed; write pip install 'ddpcall[lab]'") from error
    AcceleratorState._reset_state(True)  # it outlives the process group it was made for
    accelerator = Accelerator(cpu=settings.device.type == "cpu", mixed_precision=mixed_precision)
    return accelerator, accelerator.prepare(model)


@contextmanager
def _accelerate_session() -> Iterator[None]:
    from accelerate.state import AcceleratorState

    try:
        yield
    finally:
        AcceleratorState._reset_state(True)


def apply_fabric(model: nn.Module, settings: Settings) -> nn.Module:
    """Hand the model to Lightning Fabric's `setup_module` with the DDP strategy."""
    try:
        from lightning_fabric import Fabric  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise WrapperMissing("Lightning Fabric is not installed; write pip install lightning-fabric") from error
    kind = "cpu" if settings.device.type == "cpu" else "cuda"
    fabric = Fabric(accelerator=kind, strategy="ddp", devices=dist.get_world_size())
    fabric.launch()
    return fabric.setup_module(model)


def apply_data_parallel(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DataParallel: threads over this process's GPUs, no other process; without GPUs, nothing at all."""
    device_ids = [settings.device] if settings.device.type == "cuda" else None
    return nn.DataParallel(model, device_ids=device_ids)


def apply_script(model: nn.Module, settings: Settings) -> nn.Module:
    """Compile the model with TorchScript, which is deprecated."""
    with _silence_torchscript():
        scripted: Any = torch.jit.script(model)
    return scripted


def apply_trace(model: nn.Module, settings: Settings) -> nn.Module:
    """Record the model's operations on an example with TorchScript, which is deprecated."""
    with _silence_torchscript():
        traced: Any = torch.jit.trace(model, settings.example, check_trace=False)
    return traced


@contextmanager
def _silence_torchscript() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.\w+. is (deprecated|not supported)")
        yield


def apply_export(model: nn.Module, settings: Settings) -> nn.Module:
    """Export the model's graph for an example and unpack it as a module: `torch.export.export(…).module()`."""
    return torch.export.export(model, (settings.example,)).module()


# The wrappers whose `apply_*` does not bear their own name.
_APPLIED_AS = {
    Wrapper.DDP_JOIN: "ddp",
    Wrapper.DDP_JOIN_UNEVEN: "ddp",
    Wrapper.COMPILE_AOT_EAGER: "compile_with_backend",
    Wrapper.COMPILE_INDUCTOR: "compile_with_backend",
}
_APPLY: dict[Wrapper, Callable[[nn.Module, Settings], nn.Module]] = {
    wrapper: globals()[f"apply_{_APPLIED_AS.get(wrapper, wrapper)}"]
    for wrapper in Wrapper
    if wrapper is not Wrapper.CUSTOM
}
_SESSIONS: dict[Wrapper, Callable[[], AbstractContextManager[Any]]] = {
    wrapper: _accelerate_session for wrapper in Wrapper if wrapper.startswith("accelerate")
}


def describe_wrapper(wrapper: Wrapper) -> str:
    """Return what a wrapper does, in the words of its `apply_*`."""
    if wrapper in (Wrapper.DDP_JOIN, Wrapper.DDP_JOIN_UNEVEN):
        fewer = " The last rank has fewer." if wrapper in UNEVEN_INPUTS else ""
        return f"Wrap in DDP and train inside `Join([ddp])`, for ranks with different numbers of batches.{fewer}"
    return inspect.cleandoc(_APPLY[wrapper].__doc__ or "").split("\n\n")[0]


def find_reducers(subject: Subject) -> list[DistributedDataParallel]:
    """Return the DDP instances that own the subject's parameters.

    Blind to: `replicate` before its first call; it creates its DDP then (`replicate_state` has the rest).
    """
    found = [module for module in subject.wrapped.modules() if isinstance(module, DistributedDataParallel)]
    state = replicate_state(subject)
    if state is not None and state.has_initialized:
        found.append(internals.REPLICATE_STATE_DDP.of(state))
    return found


def replicate_state(subject: Subject) -> Any:
    """Return the state object that `replicate` keeps for the subject, or None."""
    if subject.wrapper is not Wrapper.REPLICATE:
        return None
    return internals.REPLICATE.get().state(subject.wrapped)
