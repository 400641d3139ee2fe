"""Every private name of torch that ddpcall uses: one entry each, and nowhere else.

A name is private that begins with an underscore, lies in a module that does, or is documented as internal. Such a
name may go with any release. Each entry says what it is for, what is lost without it and in which versions of
torch it was seen; a test asks the installed torch for all of them.

    internals.ENGINE_RUN_BACKWARD.get()            # the function; raises TorchNameMissing with a sentence
    internals.MODULE_PARAMETERS.of(ddp)            # an attribute of an object
    internals.REPLICATED_MODULE.get(default=None)  # where a caller can do without
    internals.list_missing("watch")                # what this torch lacks, of what the watch uses
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ddpcall.private_name import Private, TorchNameMissing, require

__all__ = ["Private", "TorchNameMissing", "require"]
LAB = ("lab",)
WATCH_AND_LAB = ("watch", "lab")


def list_entries() -> list[Private]:
    """Return every entry of this file."""
    values = list(globals().values())
    tables = [value.values() for value in values if isinstance(value, dict)]
    return [entry for entry in chain(values, *tables) if isinstance(entry, Private)]


def list_missing(room: str) -> list[Private]:
    """Return the names that a room uses and the installed torch lacks, though it should have them."""
    entries = [entry for entry in list_entries() if room in entry.rooms and entry.is_expected()]
    return [entry for entry in entries if entry.is_missing()]


# ---- DistributedDataParallel ------------------------------------------------------------------------------------

_DDP = "torch.nn.parallel.distributed.DistributedDataParallel."
DDP_PRE_FORWARD = Private(
    _DDP + "_pre_forward",
    "to see the inputs of the wrapper's forward",
    "ranks that are given the same data are not found",
)
DDP_POST_FORWARD = Private(
    _DDP + "_post_forward",
    "to see the reducer being prepared for a backward",
    "whether gradients are averaged cannot be told",
    WATCH_AND_LAB,
)
ACTIVE_DDP_MODULE = Private(
    _DDP + "_active_ddp_module",
    "to know that the wrapper's own forward is running",
    "calls through DDP cannot be told from calls past it",
)
MODULE_PARAMETERS = Private(
    _DDP + "_module_parameters",
    "to know the parameters that the reducer owns",
    "gradients cannot be assigned to a DDP model",
)
OTHER_REDUCERS = {
    name: Private(
        _DDP + name,
        "to leave DDP alone where it reduces in Python or all at the end",
        "a DDP model that reduces in Python or all at the end would be judged wrongly",
    )
    for name in ("_use_python_reducer", "_delay_all_reduce_all_params")
}
DELAYED_PARAMETERS = Private(
    _DDP + "_delay_all_reduce_params",
    "to know parameters that are reduced after the backward",
    "parameters that are reduced after the backward are not named as not followed",
)
COMM_HOOKS = Private(
    _DDP + "_comm_hooks",
    "to know replicas that local SGD lets differ",
    "replicas under local SGD would be compared",
)
DDP_LOGGING_DATA = Private(
    _DDP + "_get_ddp_logging_data",
    "to read DDP's own count of iterations",
    "the reducer probe has no second count of iterations",
    LAB,
)
REGISTER_BUFFER_COMM_HOOK = Private(
    _DDP + "_register_buffer_comm_hook",
    "to send buffers after the forward",
    "wrapper=ddp_buffers_after cannot be applied",
    LAB,
)
BUFFER_COMM_HOOK_LOCATION = Private(
    "torch.nn.parallel.distributed._BufferCommHookLocation",
    "to send buffers after the forward",
    "wrapper=ddp_buffers_after cannot be applied",
    LAB,
)
IGNORED_BY_DDP = Private(
    _DDP + "_ddp_params_and_buffers_to_ignore",
    "to leave parameters alone that DDP was told to ignore",
    "ignored parameters would be compared between ranks",
)
IN_BACKWARD_OPTIMIZERS = Private(
    "torch.distributed.optim.apply_optimizer_in_backward._apply_optimizer_in_backward._in_backward_optimizers",
    "to know optimizers that step inside the backward",
    "steps inside the backward would be reported as too early",
)
CHECK_REDUCER_FINALIZED = Private(
    "torch._C._distributed_c10d.Reducer._check_reducer_finalized",
    "to know whether the reducer is through with a backward",
    "a backward in parts cannot be told from a whole one",
)
PREPARE_FOR_BACKWARD = Private(
    "torch._C._distributed_c10d.Reducer.prepare_for_backward",
    "to see every preparation of the reducer",
    "whether gradients are averaged cannot be told",
)
GRAD_BUCKETS = Private(
    "torch._C._distributed_c10d.Reducer._get_zeros_like_grad_buckets",
    "to ask a reducer which parameters it has",
    "a DDP model made before the watch, whose parameters were frozen since, is not watched",
)
GET_BACKWARD_STATS = Private(
    "torch._C._distributed_c10d.Reducer.get_backward_stats",
    "to know whether gradients came to the reducer",
    "whether a prepared reducer reduced anything cannot be told",
)

# ---- replicate and fully_shard ----------------------------------------------------------------------------------

_REPLICATE = "torch.distributed._composable.replicate."
REPLICATE = Private(
    _REPLICATE + "replicate", "to wrap a model in place", "wrapper=replicate cannot be applied", LAB
)
REPLICATED_MODULE = Private(
    _REPLICATE + "DDP",
    "to see where `replicate` switches synchronization off",
    "the line that switches synchronization off under `replicate` is not named",
)
REPLICATE_STATE = Private(
    _REPLICATE + "_ReplicateState",
    "to see models that `replicate` wraps",
    "models under `replicate` are not watched",
)
REPLICATE_STATE_DDP = Private(
    _REPLICATE + "_ReplicateState._ddp",
    "to get at the DDP object inside `replicate`",
    "the reducer of a model under `replicate` cannot be asked",
    WATCH_AND_LAB,
)
REPLICATE_STATE_INIT = Private(
    _REPLICATE + "_ReplicateState.init",
    "to be there when `replicate` makes its DDP object",
    "the reducer of a model under `replicate` cannot be asked",
    LAB,
)
REPLICATE_WITH_FSDP = Private(
    "torch.distributed._composable.replicate_with_fsdp.replicate",
    "to wrap a model in place with replicated DTensors",
    "wrapper=replicate_with_fsdp cannot be applied",
    LAB,
)
COMPOSABLE = Private(
    "torch.distributed._composable",
    "to know the hooks of torch's own sharding by their module",
    "models under `replicate` are not watched",
)
_FULLY_SHARD = "torch.distributed.fsdp._fully_shard."
FSDP_MODULE = Private(
    _FULLY_SHARD + "_fully_shard.FSDPModule",
    "to see where fully_shard's synchronization is switched off, as soon as its module is imported",
    "sharded models are not watched",
)
GET_FSDP_STATE = Private(
    _FULLY_SHARD + "_fully_shard.FSDPModule._get_fsdp_state",
    "to find the parameter groups of a sharded model",
    "sharded models are not watched",
)
FSDP_TRAINING_STATE = Private(
    _FULLY_SHARD + "_fsdp_state.FSDPState._training_state",
    "to know that a sharded model is between its own hooks",
    "forwards past fully_shard's hooks are not seen",
)
FSDP_PARAM_GROUP = Private(
    _FULLY_SHARD + "_fsdp_state.FSDPState._fsdp_param_group",
    "to find the parameter group of a sharded model",
    "sharded models are not watched",
)
FSDP_PARAM_GROUPS = Private(
    _FULLY_SHARD + "_fsdp_state.FSDPState._fsdp_param_groups",
    "to find the parameter groups of a sharded model, where it may have several",
    "only the first parameter group of a sharded module is watched",
    seen=("2.13", "2.14", "2.15"),
)
FSDP_PARTS = {
    path: Private(
        _FULLY_SHARD + path,
        "to find gradients that were not reduced",
        "gradients that fully_shard never reduced are not found",
    )
    for path in (
        "_fsdp_param_group.FSDPParamGroup.fsdp_params",
        "_fsdp_param_group.FSDPParamGroup.reduce_grads",
        "_fsdp_param.FSDPParam.sharded_param",
        "_fsdp_param.FSDPParam.unsharded_accumulated_grad",
    )
}
FSDP_MIXING = {
    name: Private(
        f"{_FULLY_SHARD}_fsdp_param.FSDPParam.{name}",
        "to see a rank's own gradient before it is reduced, and in which precision it is",
        "the mixing matrix of fully_shard is not measured",
        LAB,
    )
    for name in ("init_unsharded_param", "reduce_dtype")
}
FSDP_UNSHARDED_PARAM = Private(
    _FULLY_SHARD + "_fsdp_param.FSDPParam._unsharded_param",
    "to find gradients that were not reduced",
    "gradients that fully_shard never reduced are not found",
)
FSDP_PARAM_FQN = Private(
    _FULLY_SHARD + "_fsdp_param.FSDPParam._param_fqn",
    "to name a parameter from the root of the model",
    "parameters of sharded models are not named",
)
FSDP_MODULE_INFO = Private(
    _FULLY_SHARD + "_fsdp_param.FSDPParam._module_info",
    "to name a parameter before its first forward",
    "parameters of sharded models are not named",
)
_FSDP1 = "torch.distributed.fsdp."
_NO_FLAT = "the mixing matrix of FSDP1 is not measured"
FSDP1 = {
    name: Private(
        f"{_FSDP1}fully_sharded_data_parallel.FullyShardedDataParallel._{name}",
        "to find the flat parameter of an FSDP1 module",
        _NO_FLAT,
        LAB,
    )
    for name in ("handle", "fsdp_wrapped_module")
}
FLAT_HANDLE = {
    name.removeprefix("_"): Private(
        f"{_FSDP1}_flat_param.FlatParamHandle.{name}", "to know how FSDP1 holds parameters", _NO_FLAT, LAB
    )
    for name in ("flat_param", "uses_sharded_strategy", "_use_orig_params", "_reduce_dtype")
}
FLAT_PARAMETER = {
    name: Private(
        f"{_FSDP1}_flat_param.FlatParameter._{name}", "to find parameters in FSDP1's flat ones", _NO_FLAT, LAB
    )
    for name in (
        *("fqns", "numels", "numels_with_padding", "is_padding_mask", "params", "shard_param_infos"),
        "saved_grad_shard",
    )
}
FLAT_REDUCTIONS = {
    name: Private(f"{_FSDP1}_runtime_utils._{name}", "to see gradients that FSDP1 reduces", _NO_FLAT, LAB)
    for name in ("reduce_grad", "reduce_grad_no_shard")
}

# ---- nn.Module --------------------------------------------------------------------------------------------------

_MODULE = "torch.nn.modules.module.Module."
CALLS = {
    name: Private(
        _MODULE + name,
        "to tell a module's call from its bare forward on the stack",
        "forwards that skip hooks cannot be told from calls",
        WATCH_AND_LAB,
    )
    for name in ("_call_impl", "_slow_forward")
}
COMPILED_CALL_IMPL = Private(
    _MODULE + "_compiled_call_impl",
    "to count calls of a module that was compiled in place",
    "modules compiled in place are not watched",
)
APPLY = Private(
    _MODULE + "_apply",
    "to see conversions that leave the reducer's parameters behind",
    "conversions of a wrapped model are not seen",
)
REPLICATE_FOR_DATA_PARALLEL = Private(
    _MODULE + "_replicate_for_data_parallel",
    "to make DataParallel's replicas without taps",
    "models under DataParallel must not be tapped",
    WATCH_AND_LAB,
)
MODULE_TABLES = {
    name: Private(f"{_MODULE}_{name}", "to see cheaply whether a model was changed", "replicas are not compared")
    for name in ("modules", "parameters", "buffers")
}
NON_PERSISTENT_BUFFERS = Private(
    _MODULE + "_non_persistent_buffers_set",
    "to leave buffers alone that are in no checkpoint",
    "caches in buffers would be compared between ranks",
)
HOOK_DICTS = {
    kind: Private(
        f"{_MODULE}_{kind.removeprefix('full_')}_hooks",
        "to see the hooks that a call would run",
        "hooks that a bypass skips are not found",
        WATCH_AND_LAB,
    )
    for kind in ("forward_pre", "forward", "full_backward_pre", "full_backward")
}
IS_FULL_BACKWARD_HOOK = Private(
    _MODULE + "_is_full_backward_hook",
    "to put a module back as it was after a counting hook",
    "hooks cannot be counted without a trace",
    WATCH_AND_LAB,
)
GLOBAL_IS_FULL_BACKWARD_HOOK = Private(
    "torch.nn.modules.module._global_is_full_backward_hook",
    "to put torch back as it was after a counting hook for all modules",
    "global hooks cannot be counted without a trace",
    LAB,
)
NORM_BASE = Private(
    "torch.nn.modules.batchnorm._NormBase",
    "to find batch norm layers",
    "statistics of batch norm are not looked at",
    WATCH_AND_LAB,
)
CONV_ND = Private(
    "torch.nn.modules.conv._ConvNd", "to find convolutions", "the precision of convolutions is not looked at", LAB
)
DROPOUT_ND = Private(
    "torch.nn.modules.dropout._DropoutNd",
    "to find dropout layers",
    "dropout masks are not looked at",
    WATCH_AND_LAB,
)
CREATE_SCRIPT_MODULE = Private(
    "torch.jit._recursive.create_script_module",
    "to script modules without taps",
    "a model under the watch cannot be scripted",
    WATCH_AND_LAB,
)
SCRIPT_IMPL = Private(
    "torch.jit._script._script_impl",
    "to script functions that draw random numbers",
    "torch.jit.script may refuse such functions in steps 2, 4, 8 and 16",
)

# ---- data loaders -----------------------------------------------------------------------------------------------

_LOADER_ITERATOR = "torch.utils.data.dataloader._BaseDataLoaderIter"
_WITHOUT_INDICES = "the order and the shares of the data are not looked at"
LOADER_ITERATOR = Private(_LOADER_ITERATOR, "to follow passes over data loaders", _WITHOUT_INDICES)
NEXT_INDEX = Private(_LOADER_ITERATOR + "._next_index", "to see the indices that samplers give", _WITHOUT_INDICES)
SAMPLER_ITERATOR = Private(_LOADER_ITERATOR + "._sampler_iter", "to tell passes apart", _WITHOUT_INDICES)
INDEX_SAMPLER = Private(_LOADER_ITERATOR + "._index_sampler", "to know a loader's sampler", _WITHOUT_INDICES)
LOADER_DATASET = Private(_LOADER_ITERATOR + "._dataset", "to know what the indices are of", _WITHOUT_INDICES)

# ---- autograd and optimizers ------------------------------------------------------------------------------------

ENGINE_RUN_BACKWARD = Private(
    "torch.autograd.graph._engine_run_backward",
    "to stand around every backward that Python starts",
    "gradients that torch.autograd.grad takes are not seen",
)
EXECUTION_ENGINE = Private(
    "torch.autograd.Variable._execution_engine",
    "to be called at the end of a backward",
    "the end of a backward is not seen",
    WATCH_AND_LAB,
)
CURRENT_GRAPH_TASK = Private(
    "torch._C._current_graph_task_id",
    "to know that a backward is running, and which",
    "forwards that a checkpoint recomputes in a backward cannot be told from others",
    WATCH_AND_LAB,
)
CURRENT_AUTOGRAD_NODE = Private(
    "torch._C._current_autograd_node",
    "to tell the script's collectives from those of a differentiable operation",
    "collectives inside a backward would count as reductions of gradients",
)
TENSOR_REQUIRES_GRAD = Private(
    "torch._C.TensorBase.requires_grad",
    "to see parameters being unfrozen",
    "parameters that are unfrozen after wrapping are named without a line",
)
TENSOR_VERSION = Private(
    "torch._C.TensorBase._version",
    "to see whether a gradient was written to",
    "a gradient that was computed as zero cannot be told from one that was zeroed",
)
POST_ACCUMULATE_GRAD_HOOKS = Private(
    "torch._C.TensorBase._post_accumulate_grad_hooks",
    "to put a parameter back as it was after a hook",
    "an empty dict stays at each parameter that was watched",
    WATCH_AND_LAB,
)
TENSOR_BACKWARD_HOOKS = Private(
    "torch._C.TensorBase._backward_hooks",
    "to see a gradient before and after the script's hooks",
    "the mixing matrix counts what a gradient hook adds as a rank's own",
    LAB,
)
WILL_ENGINE_EXECUTE_NODE = Private(
    "torch._C._will_engine_execute_node",
    "to know whether a backward reaches a parameter",
    "the mixing matrix is not measured",
    LAB,
)
SPLIT_TENSOR = Private(
    "torch.distributed.tensor.placement_types.Shard._split_tensor",
    "to know which elements of a tensor a rank holds",
    "sharded tensors have no sketch",
    WATCH_AND_LAB,
)
OPTIMIZER_STEP_PRE_HOOKS = Private(
    "torch.optim.optimizer.Optimizer._optimizer_step_pre_hooks",
    "to judge gradients after the optimizer's own hooks, which may reduce them",
    "gradients that an optimizer's hook reduces would be reported",
)
CLIP_WITH_NORM = Private(
    "torch.nn.utils.clip_grad._clip_grads_with_norm_",
    "to see gradients as they are clipped, by whatever name a script knows the function",
    "gradients that are clipped before they are averaged are not found",
)
IS_PROFILER_ENABLED = Private(
    "torch.autograd.profiler._is_profiler_enabled",
    "to leave a profile that is running alone",
    "collectives are not timed",
    LAB,
)

FUNCTORCH_LEVEL = Private(
    "torch._C._functorch.maybe_current_level",
    "to leave losses inside torch.func alone",
    "numbers of targets inside torch.func are read, and measuring ends with an error",
)

# ---- compiler ---------------------------------------------------------------------------------------------------

DISABLE_DYNAMO = Private(
    "torch._disable_dynamo",
    "to keep dynamo out of the watch's own functions without importing it",
    "dynamo is imported with the watch",
    WATCH_AND_LAB,
)
SKIP_CODE = Private(
    "torch._dynamo.eval_frame.skip_code",
    "to keep dynamo out of a tapped forward",
    "scripts that compile have more frames under the watch",
    WATCH_AND_LAB,
)
OPTIMIZED_MODULE = Private(
    "torch._dynamo.eval_frame.OptimizedModule",
    "to find objects that torch.compile made before the watch began",
    "models compiled before the watch began are not watched",
)
ORIG_MOD = Private(
    "torch._dynamo.eval_frame.OptimizedModule._orig_mod",
    "to look past torch.compile's wrapper",
    "methods called on a compiled object are not seen",
    WATCH_AND_LAB,
)
FRAME_COUNTER = Private(
    "torch._dynamo.convert_frame.FRAME_COUNTER",
    "to know whether anything was compiled",
    "the line that uses weights directly is looked for in compiled programs too",
)
LOOKUP_BACKEND = Private(
    "torch._dynamo.backends.registry.lookup_backend",
    "to count the graphs that a backend compiles",
    "the compiled probe cannot count",
    LAB,
)
COUNTERS = Private(
    "torch._dynamo.utils.counters", "to read dynamo's own count of frames", "the compiled probe cannot count", LAB
)
DYNAMO = Private(
    "torch._dynamo",
    "to drop compiled code after a test on ranks",
    "compiled code of one test is there in the next",
    ("ranks",),
)
COMPILER_CONFIGS = {
    path: Private(
        path,
        "to choose DDP's Python reducer, and to put back what it or a test on ranks changes",
        "wrapper=ddp_python_reducer cannot be applied; a test on ranks leaves its settings to the next",
        ("lab", "ranks"),
    )
    for path in ("torch._dynamo.config", "torch._inductor.config")
}

# ---- process groups and processes -------------------------------------------------------------------------------

GET_DEFAULT_STORE = Private(
    "torch.distributed.distributed_c10d._get_default_store",
    "to compare ranks where there is no launcher's store",
    "ranks that torchrun did not start are not compared",
)
UPDATE_DEFAULT_PG = Private(
    "torch.distributed.distributed_c10d._update_default_pg",
    "to hear of a process group being made",
    "the size of a process group is not known, ranks that multiprocessing starts are not watched, and ranks are "
    "not compared with one process",
    ("watch", "compare"),
)
CLEAR_SHARDING_CACHE = Private(
    "torch.distributed.tensor.debug._clear_sharding_prop_cache",
    "to make DTensor forget the process group of an earlier comparison",
    "a tensor-parallel model is compared with one process once in a process, not again",
    ("compare",),
)
WORLD = Private(
    "torch.distributed.distributed_c10d._world",
    "to know whether a test made process groups of its own",
    "every test waits for its slowest rank",
    ("ranks",),
)
_GLOO = "torch._C._distributed_c10d.ProcessGroupGloo._Options"
_SLOW_LEAVING = "a test on ranks takes about 20 ms longer"
GLOO_OPTIONS = Private(_GLOO, "to reuse one gloo device in a worker", _SLOW_LEAVING, ("ranks",))
GLOO_DEVICES = Private(_GLOO + "._devices", "to reuse one gloo device in a worker", _SLOW_LEAVING, ("ranks",))
GLOO_TIMEOUT = Private(_GLOO + "._timeout", "to reuse one gloo device in a worker", _SLOW_LEAVING, ("ranks",))
REDUCE_SCATTER_BASE = Private(
    "torch._C._distributed_c10d.ProcessGroup._reduce_scatter_base",
    "to see gradients that a script reduces itself",
    "gradients that are reduced by reduce_scatter_tensor would be reported",
)
ALLGATHER_BASE = Private(
    "torch._C._distributed_c10d.ProcessGroup._allgather_base",
    "to see what a script sends itself",
    "gradients that are exchanged by all_gather_into_tensor would be reported",
)
FUNCTIONAL_COLLECTIVES = Private(
    "torch.distributed._functional_collectives",
    "to see gradients that a script reduces by functional collectives",
    "gradients that are reduced by functional collectives would be reported",
)
POP_FUNCTION_MODE = Private(
    "torch.overrides._pop_mode",
    "to see what a script computes from a gathered tensor",
    "gathers without a gradient are not found",
)
PUSH_FUNCTION_MODE = Private(
    "torch.overrides._push_mode",
    "to see what a script computes from a gathered tensor",
    "gathers without a gradient are not found",
)
NUM_FUNCTION_MODES = Private(
    "torch._C._len_torch_function_stack",
    "to see what a script computes from a gathered tensor",
    "gathers without a gradient are not found",
)
DEVICE_CONTEXT = Private(
    "torch.utils._device.DeviceContext",
    "to leave a default device where it is",
    "gathers without a gradient are not found",
)
DUMP_FLIGHT_RECORDER = Private(
    "torch._C._distributed_c10d._dump_fr_trace_json",
    "to count collectives independently, and to see which one a rank waits in",
    "the collectives probe has no second count, and of a run that hangs the stacks alone tell",
    WATCH_AND_LAB,
)
SPAWN_WRAP = Private(
    "torch.multiprocessing.spawn._wrap",
    "to watch processes that torch.multiprocessing starts",
    "processes started by torch.multiprocessing are not watched",
)

# ---- what is used from here, without a look-up each time --------------------------------------------------------

graph_task: Callable[[], int] = CURRENT_GRAPH_TASK.get(lambda: -1)
autograd_node: Callable[[], Any] = CURRENT_AUTOGRAD_NODE.get(lambda: None)


def is_ddp_running() -> bool:
    """Say whether a DDP's own forward is running; this is asked before every watched forward."""
    return DistributedDataParallel._active_ddp_module is not None  # pyright: ignore[reportPrivateUsage]


def disable_dynamo(function: Callable[..., Any], recursive: bool = True) -> Callable[..., Any]:
    """Return the function so that dynamo leaves it alone, and with `recursive` all it calls."""
    return DISABLE_DYNAMO.get(torch.compiler.disable)(function, recursive=recursive)
