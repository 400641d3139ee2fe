"""The ways a model is prepared: the only room that imports DDP, FSDP, torch.compile, accelerate and the like.

One `apply_*` a wrapper, with what is to be known of it in the decorator. Each takes the user's module and returns
what a training script would hold; `apply_wrapper` puts that beside the user's own module, in a `Subject`. Grids,
Hydra's group `wrapper` and the documents are made from `WRAPPERS`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ddpcall import torch_internals as internals
from ddpcall.accelerator import device_ids
from ddpcall.paths import CallPath, SyncWindow
from ddpcall.reductions import (
    average_parameters_periodically,
    average_with_neighbors,
    drop_last_rank,
    sum_gradients,
)

CompileBackend = str | Callable[..., Any]
_Apply = TypeVar("_Apply", bound=Callable[..., nn.Module])


class WrapperMissing(RuntimeError):
    """The wrapper belongs to a package, or a version of torch, that is not installed here."""


@dataclass(frozen=True)
class Subject:
    """A wrapped model.

    Attributes:
        wrapper: How it was prepared: a name in `WRAPPERS`.
        wrapped: The object the training script holds.
        inner: The user's own module; the very same object as `wrapped` where the wrapper works in place.
        session: What a script puts around its training loop for this wrapper: a `Join`, a setting of dynamo's.
        prepare_optimizer: What it puts around its optimizer; returns what has `step()` and `zero_grad()`.
    """

    wrapper: str
    wrapped: nn.Module
    inner: nn.Module
    session: Callable[[], AbstractContextManager[Any]] = nullcontext
    prepare_optimizer: Callable[[Optimizer], Any] = lambda optimizer: optimizer

    @property
    def spec(self) -> WrapperSpec:
        """What is known of the wrapper."""
        return WRAPPERS[self.wrapper]


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


@dataclass(frozen=True, kw_only=True)
class WrapperSpec:
    """What is to be known of a wrapper.

    Attributes:
        apply: Prepares a model; its docstring says what the wrapper does. None for the user's own function.
        in_place: Whether the wrapped object is the inner module itself.
        data_parallel: Whether it joins what different ranks learn from different batches.
        no_sync: Whether the wrapped object has the method `no_sync()`; DDP and FSDP1 have it.
        own_reducer: Whether gradients are reduced without DDP's C++ reducer, or by other means than all-reduces
            over all ranks: the taps on that reducer say nothing then.
        compiles: Whether it hands the model to torch.compile.
        compile_backend: The backend that its name fixes; None: the configured one.
        same_batch: Whether all ranks must be given the same batch, since each holds a part of one model.
        uneven_inputs: Whether the last rank has fewer batches than the others.
        flat_parameters: Whether it trains a flat parameter that only the wrapped object knows, as FSDP1 does.
        resumable: Whether its whole state is in the model and the optimizer, so that a trial can go on in mid-run
            to the same bits, which a test must show. Others keep some of it elsewhere (PowerSGD's error, the
            counter of local SGD, what the first step of a static graph learned), hold shards, or compile anew.
        session: What a script puts around its training loop, given the wrapped object.
        prepare_optimizer: What it puts around its optimizer.
    """

    apply: Callable[[nn.Module, Settings], nn.Module] | None
    in_place: bool = False
    data_parallel: bool = True
    no_sync: bool = False
    own_reducer: bool = False
    compiles: bool = False
    compile_backend: str | None = None
    same_batch: bool = False
    uneven_inputs: bool = False
    flat_parameters: bool = False
    resumable: bool = False
    session: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    prepare_optimizer: Callable[[Optimizer], Any] = lambda optimizer: optimizer

    @property
    def description(self) -> str:
        """What the wrapper does, in the words of its `apply_*`."""
        return " ".join(inspect.cleandoc((self.apply and self.apply.__doc__) or "").split("\n\n")[0].split())

    def meaningful_paths(self) -> list[CallPath]:
        """List the call paths that differ: in place, the inner module is the wrapped one."""
        return [path for path in CallPath if not (self.in_place and path in _INNER_PATHS)]

    def meaningful_windows(self) -> list[SyncWindow]:
        """List the sync windows that it can stand in."""
        return [window for window in SyncWindow if self.no_sync or not window.value.startswith("no_sync")]


# By name, in the order of this file.
WRAPPERS: dict[str, WrapperSpec] = {}
_INNER_PATHS = frozenset({CallPath.INNER_CALL, CallPath.INNER_FORWARD})


def _wrapper(**facts: Any) -> Callable[[_Apply], _Apply]:
    """Enter an `apply_*` into `WRAPPERS`, under the rest of its name."""

    def enter(apply: _Apply) -> _Apply:
        WRAPPERS[apply.__name__.removeprefix("apply_")] = WrapperSpec(apply=apply, **facts)
        return apply

    return enter


_ddp = partial(_wrapper, no_sync=True)
_sharding = partial(_wrapper, own_reducer=True)
_compiling = partial(_wrapper, compiles=True)


def apply_wrapper(
    wrapper: str,
    model: nn.Module,
    *,
    device: torch.device,
    compile_backend: CompileBackend = "eager",
    example: Tensor | None = None,
    **ddp_options: Any,
) -> Subject:
    """Prepare a model, already on its device, the way `wrapper` says.

    Args:
        wrapper: A name in `WRAPPERS`, other than `custom`.
        model: The user's module; its parameters are broadcast from rank 0 by the DDP wrappers.
        device: Where the model lives; DDP gets it as `device_ids` on CUDA.
        compile_backend: Backend handed to torch.compile by the compiling wrappers.
        example: One rank's inputs of one step; `trace` and `export` record a call with them.
        **ddp_options: Keyword arguments for DDP's constructor.

    Raises:
        WrapperMissing: The package or torch feature behind the wrapper is not installed.
        ValueError: No default process group, for wrappers that need one (torch's own error).
    """
    spec = WRAPPERS[wrapper]
    if spec.apply is None:
        raise ValueError(f"{wrapper} is the user's own function")
    wrapped = spec.apply(model, Settings(device, compile_backend, ddp_options, example))
    return Subject(wrapper, wrapped, model, lambda: spec.session(wrapped), spec.prepare_optimizer)


@contextmanager
def _join(ddp: Any) -> Generator[None]:
    from torch.distributed.algorithms.join import Join

    with Join([ddp]):
        yield


@contextmanager
def _accelerate_session(_: Any) -> Generator[None]:
    from accelerate.state import AcceleratorState

    try:
        yield
    finally:
        AcceleratorState._reset_state(True)  # pyright: ignore[reportPrivateUsage]


@_wrapper(in_place=True, data_parallel=False, resumable=True)
def apply_none(model: nn.Module, settings: Settings) -> nn.Module:
    """Leave the model as it is."""
    return model


@_ddp(resumable=True)
def apply_ddp(model: nn.Module, settings: Settings, **options: Any) -> DistributedDataParallel:
    """Wrap in DistributedDataParallel: the reducer that averages gradients, armed by `DDP.forward`."""
    return DistributedDataParallel(model, device_ids=device_ids(settings.device), **(options | settings.ddp))


@_ddp()
def apply_ddp_static_graph(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP that expects the same graph in every step."""
    return apply_ddp(model, settings, static_graph=True)


@_ddp(resumable=True)
def apply_ddp_find_unused(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP that searches each forward's graph for parameters without a part in it."""
    return apply_ddp(model, settings, find_unused_parameters=True)


@_ddp(resumable=True)
def apply_ddp_bucket_view(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP whose gradients are views into the communication buckets."""
    return apply_ddp(model, settings, gradient_as_bucket_view=True)


@_ddp(resumable=True)
def apply_ddp_comm_hook(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP with a communication hook: gradients travel as float16."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    return _with_comm_hook(apply_ddp(model, settings), fp16_compress_hook)


@_ddp(resumable=True)
def apply_ddp_local_buffers(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP that leaves each rank its own buffers; torch 2.13 renamed the argument."""
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return apply_ddp(model, settings, **{name: False})


@_ddp()
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


@_ddp(resumable=True)
def apply_ddp_summed(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP with a communication hook that sums gradients over the ranks and does not divide."""
    return _with_comm_hook(apply_ddp(model, settings), sum_gradients)


@_ddp()
def apply_ddp_dropped_rank(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP with a communication hook to which the last rank contributes zeros."""
    return _with_comm_hook(apply_ddp(model, settings), drop_last_rank)


@_ddp()
def apply_ddp_ring(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP with a communication hook that averages with the two neighbors on a ring, as gossip SGD does."""
    return _with_comm_hook(apply_ddp(model, settings), average_with_neighbors)


@_ddp()
def apply_ddp_powersgd(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP with PowerSGD's communication hook: from the third step on, gradients travel as rank 1."""
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    state = PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    return _with_comm_hook(apply_ddp(model, settings), powerSGD_hook, state)


def _with_comm_hook(ddp: DistributedDataParallel, hook: Any, state: object = None) -> DistributedDataParallel:
    ddp.register_comm_hook(state, hook)
    return ddp


@_ddp(own_reducer=True)
def apply_ddp_groups(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP over a process group of half the ranks: two halves that never meet."""
    return apply_ddp(model, settings, process_group=_halves(settings).get_group("inner"))


@_wrapper(in_place=True, own_reducer=True, prepare_optimizer=average_parameters_periodically)
def apply_local_sgd(model: nn.Module, settings: Settings) -> nn.Module:
    """Leave the model as it is and average parameters, not gradients, after every fourth step: local SGD."""
    return model


@_wrapper(session=_join)
def apply_ddp_join(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP and train inside `Join([ddp])`, for ranks with different numbers of batches."""
    return apply_ddp(model, settings)


@_wrapper(session=_join, uneven_inputs=True)
def apply_ddp_join_uneven(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP and train inside `Join([ddp])`; the last rank has fewer batches."""
    return apply_ddp(model, settings)


@_ddp(own_reducer=True)
def apply_ddp_python_reducer(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DDP with its reducer in Python, which dynamo can trace: gradient hooks that all-reduce.

    Source: `torch/nn/parallel/distributed.py`, `_register_accum_grad_hook`.
    """
    with _python_reducer():
        return apply_ddp(model, settings)


@contextmanager
def _python_reducer() -> Generator[None]:
    """Choose the python reducer; DDP's constructor then changes inductor's settings, which are put back."""
    dynamo_config, inductor_config = map(_private, internals.COMPILER_CONFIGS.values())
    before = inductor_config.save_config_portable()
    with dynamo_config.patch(optimize_ddp="python_reducer"):
        try:
            yield
        finally:
            inductor_config.load_config(before)


def _private(name: internals.Private) -> Any:
    """Return what a private name of torch stands for; a wrapper that needs one that is gone is missing."""
    try:
        return name.get()
    except internals.TorchNameMissing as error:
        raise WrapperMissing(str(error)) from None


@_wrapper(in_place=True, resumable=True)
def apply_replicate(model: nn.Module, settings: Settings) -> nn.Module:
    """Apply the hook-based `torch.distributed._composable.replicate`: it arms from forward hooks, in place."""
    replicate = _private(internals.REPLICATE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it announces its successor, `replicate_with_fsdp`
        return replicate(model, device_id=settings.device)


@_sharding(in_place=True)
def apply_replicate_with_fsdp(model: nn.Module, settings: Settings) -> nn.Module:
    """Apply `replicate` as FSDP2 does it: parameters are replicated DTensors, gathered by forward-pre hooks."""
    replicated: Any = _private(internals.REPLICATE_WITH_FSDP)(model, mesh=_mesh(settings))
    return replicated


@_sharding(no_sync=True, flat_parameters=True)
def apply_fsdp1(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in FullyShardedDataParallel, the first FSDP, with the user's own parameters as views."""
    try:
        from torch.distributed.fsdp import FullyShardedDataParallel
    except ImportError as error:
        raise WrapperMissing("torch no longer has FullyShardedDataParallel; write wrapper=fsdp2") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it announces fully_shard
        return FullyShardedDataParallel(model, device_id=settings.device, use_orig_params=True)


@_sharding(in_place=True)
def apply_fsdp2(model: nn.Module, settings: Settings) -> nn.Module:
    """Apply `fully_shard` to the root alone: the root's hooks gather every parameter."""
    from torch.distributed.fsdp import fully_shard

    sharded: Any = fully_shard(model, mesh=_mesh(settings))
    return sharded


@_sharding(in_place=True)
def apply_fsdp2_layers(model: nn.Module, settings: Settings) -> nn.Module:
    """Apply `fully_shard` to every child that has parameters, then to the root, as its documentation advises."""
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(settings)
    for child in model.children():
        if next(child.parameters(), None) is not None:
            fully_shard(child, mesh=mesh)
    sharded: Any = fully_shard(model, mesh=mesh)
    return sharded


@_sharding(in_place=True)
def apply_fsdp2_registered(model: nn.Module, settings: Settings) -> nn.Module:
    """Apply `fully_shard` to the root and register `forward` and `compute_loss` as ways in."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    sharded = apply_fsdp2(model, settings)
    for name in ("forward", "compute_loss"):
        if hasattr(sharded, name):
            register_fsdp_forward_method(sharded, name)
    return sharded


@_sharding(in_place=True)
def apply_fsdp2_hybrid_inner(model: nn.Module, settings: Settings) -> nn.Module:
    """Apply `fully_shard` over the inner dim of a hybrid mesh alone, without the reduction over the outer one."""
    from torch.distributed.fsdp import fully_shard

    sharded: Any = fully_shard(model, mesh=_halves(settings)["inner"])
    return sharded


@_sharding(in_place=True, data_parallel=False, same_batch=True)
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


@_compiling(data_parallel=False)
def apply_compile(model: nn.Module, settings: Settings) -> nn.Module:
    """Return what `torch.compile(model)` returns: a new object around the model."""
    compiled: Any = torch.compile(model, backend=settings.compile_backend)
    return compiled


@_compiling(data_parallel=False, compile_backend="aot_eager")
def apply_compile_aot_eager(model: nn.Module, settings: Settings) -> nn.Module:
    """Return what `torch.compile(model)` returns, with the backend that the wrapper's name ends in."""
    return apply_compile(model, settings)


@_compiling(data_parallel=False, compile_backend="inductor")
def apply_compile_inductor(model: nn.Module, settings: Settings) -> nn.Module:
    """Return what `torch.compile(model)` returns, with the backend that the wrapper's name ends in."""
    return apply_compile(model, settings)


@_compiling(data_parallel=False, in_place=True)
def apply_compile_inplace(model: nn.Module, settings: Settings) -> nn.Module:
    """Compile the model's own `__call__` with `model.compile()`."""
    model.compile(backend=settings.compile_backend)
    return model


@_compiling(no_sync=True)
def apply_ddp_of_compile(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap the compiled model in DDP."""
    return apply_ddp(apply_compile(model, settings), settings)


@_compiling()
def apply_compile_of_ddp(model: nn.Module, settings: Settings) -> nn.Module:
    """Compile the DDP-wrapped model."""
    return apply_compile(apply_ddp(model, settings), settings)


@_compiling(no_sync=True)
def apply_ddp_compile_inplace(model: nn.Module, settings: Settings) -> nn.Module:
    """Compile the `__call__` of the DDP object in place."""
    return apply_compile_inplace(apply_ddp(model, settings), settings)


@_ddp(session=_accelerate_session, resumable=True)
def apply_accelerate(model: nn.Module, settings: Settings) -> nn.Module:
    """Hand the model to `Accelerator().prepare`: DDP, and nothing else in full precision."""
    return _prepare(model, settings, "no")[1]


@_ddp(session=_accelerate_session)
def apply_accelerate_bf16(model: nn.Module, settings: Settings) -> nn.Module:
    """Hand the model to `Accelerator(mixed_precision="bf16")`: DDP, and autocast patched into inner.forward."""
    return _prepare(model, settings, "bf16")[1]


@_ddp(session=_accelerate_session)
def apply_accelerate_unwrapped(model: nn.Module, settings: Settings) -> nn.Module:
    """Prepare in bf16 and call `unwrap_model(prepared)` once, as scripts do to save."""
    accelerator, prepared = _prepare(model, settings, "bf16")
    accelerator.unwrap_model(prepared)
    return prepared


@_ddp(session=_accelerate_session)
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
    # The state outlives the process group it was made for.
    AcceleratorState._reset_state(True)  # pyright: ignore[reportPrivateUsage]
    accelerator = Accelerator(cpu=settings.device.type == "cpu", mixed_precision=mixed_precision)
    return accelerator, accelerator.prepare(model)


@_wrapper()
def apply_fabric(model: nn.Module, settings: Settings) -> nn.Module:
    """Hand the model to Lightning Fabric's `setup_module` with the DDP strategy."""
    try:
        from lightning_fabric import Fabric  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise WrapperMissing("Lightning Fabric is not installed; write pip install lightning-fabric") from error
    fabric = Fabric(accelerator=settings.device.type, strategy="ddp", devices=dist.get_world_size())
    fabric.launch()
    return fabric.setup_module(model)


@_wrapper(data_parallel=False)
def apply_data_parallel(model: nn.Module, settings: Settings) -> nn.Module:
    """Wrap in DataParallel: threads over this process's GPUs, no other process; without GPUs, nothing at all."""
    return nn.DataParallel(model, device_ids=device_ids(settings.device))


@_wrapper(data_parallel=False)
def apply_script(model: nn.Module, settings: Settings) -> nn.Module:
    """Compile the model with TorchScript, which is deprecated."""
    with _silence_torchscript():
        scripted: Any = torch.jit.script(model)
    return scripted


@_wrapper(data_parallel=False)
def apply_trace(model: nn.Module, settings: Settings) -> nn.Module:
    """Record the model's operations on an example with TorchScript, which is deprecated."""
    with _silence_torchscript():
        traced: Any = torch.jit.trace(model, settings.example, check_trace=False)
    return traced


@contextmanager
def _silence_torchscript() -> Generator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.\w+. is (deprecated|not supported)")
        yield


@_wrapper(data_parallel=False)
def apply_export(model: nn.Module, settings: Settings) -> nn.Module:
    """Export the model's graph for an example and unpack it as a module: `torch.export.export(…).module()`."""
    return torch.export.export(model, (settings.example,)).module()


# The user's own function, named by `wrapper._target_`.
WRAPPERS["custom"] = WrapperSpec(apply=None, own_reducer=True)


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
    if subject.wrapper != "replicate":
        return None
    return internals.REPLICATE.get().state(subject.wrapped)
