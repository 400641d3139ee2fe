"""Asserts about the whole world: they compare ranks, and they fail on every rank together.

An ordinary `assert` that fails on rank 1 alone leaves rank 0 waiting in its next collective. Each function here
exchanges what the ranks have first and judges the same exchanged data on every rank, so all of them raise, or
none. All ranks must call them, in the same order, inside an initialised default process group.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

_NUM_SHOWN = 5


@dataclass(frozen=True)
class Rank:
    """The rank a test body runs on.

    Attributes:
        rank: this process's rank in the default process group.
        world_size: number of ranks.
        device: where this rank's model belongs, `cpu` on gloo and `cuda:<rank>` on NCCL.
    """

    rank: int
    world_size: int
    device: torch.device

    def barrier(self) -> None:
        """Wait until every rank is here."""
        import torch.distributed as dist

        dist.barrier(device_ids=[self.rank] if self.device.type == "cuda" else None)


def current_rank() -> Rank:
    """Describe this process's place in the default process group."""
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    device = torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")
    return Rank(rank, dist.get_world_size(), device)


def assert_replicated(model: nn.Module, *, buffers: bool = False) -> None:
    """Assert that the parameters are bit for bit the same on all ranks.

    Args:
        model: wrapped or inner, the same on every rank.
        buffers: compare buffers too. Off by default, because DistributedDataParallel sends rank 0's buffers
            before a forward: after it, batch norm statistics differ between ranks and are meant to.

    Raises:
        AssertionError: on every rank; names parameters, ranks and the largest difference from rank 0.
        ValueError: a parameter is sharded (a DTensor) and has no replicas to compare.
    """
    __tracebackhide__ = True
    tensors: dict[str, torch.Tensor | None] = dict(model.named_parameters())
    if buffers:
        tensors |= dict(model.named_buffers())
    _assert_same_tensors(tensors, "parameters differ between ranks")


def assert_gradients_synchronized(model: nn.Module) -> None:
    """Assert that every gradient is bit for bit the same on all ranks, and that there is one to compare.

    Give each rank its own data: with the same batch everywhere, gradients agree without any synchronization.

    Raises:
        AssertionError: on every rank; names parameters, ranks and the largest difference from rank 0.
        ValueError: a gradient is sharded (a DTensor).

    Blind to: a synchronization that sums where it should average; ranks that were given equal batches.
    """
    __tracebackhide__ = True
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    present = _gather([name for name, gradient in gradients.items() if gradient is not None])
    missing = [rank for rank, names in enumerate(present) if not names]
    if missing:
        raise AssertionError(f"no parameter has a gradient on {_name_ranks(missing)}; call backward() first")
    _assert_same_tensors(gradients, "gradients differ between ranks")


def assert_same_on_all_ranks(value: Any) -> None:
    """Assert that a value is the same on all ranks; tensors bit for bit, containers item by item.

    Args:
        value: anything picklable.

    Raises:
        AssertionError: on every rank; says where the value differs and by how much.
        TypeError: on every rank; a rank's value cannot be pickled.
    """
    __tracebackhide__ = True
    values = _gather(value)
    problems: list[str] = []
    for rank, other in enumerate(values):
        problems += [f"rank {rank}: {text}" for text in _explain_difference(values[0], other, "value")]
    if problems:
        raise AssertionError(_list_problems("value differs between ranks", problems))


def assert_hooks_fire(model: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run something and assert that it reaches the model through its hooks, on every rank.

    Forward hooks belong to `model(x)`. `model.forward(x)` and `model.module(x)` compute the same output past the
    hooks of `model`, and with them past everything built on hooks. A module whose forward ran must have fired,
    and `model` itself must be among them.

    Args:
        model: the object the training script holds.
        run: called with the remaining arguments, for instance the training step, or the model itself.
        *args: positional arguments of `run`.
        **kwargs: keyword arguments of `run`.

    Returns:
        What `run` returned.

    Raises:
        AssertionError: on every rank; names the modules whose forward ran past their hooks, and the ranks.

    Blind to: submodules that `torch.compile` has inlined; modules added while `run` runs.
    """
    __tracebackhide__ = True
    with _count_calls(model) as (num_forwards, num_hooks):
        result = run(*args, **kwargs)
    silent = [name for name, count in num_forwards.items() if count > num_hooks[name]]
    if any(num_forwards.values()) and not num_hooks[""] and "" not in silent:
        silent.insert(0, "")
    if not any(num_forwards.values()):
        silent = ["(nothing: no forward ran)"]
    problems = [
        f"rank {rank}: {name or type(model).__name__ + ' (the model itself)'}"
        for rank, names in enumerate(_gather(silent))
        for name in names
    ]
    if problems:
        headline = (
            "forward ran without these modules' hooks; write model(x), not model.forward(x) or model.module(x)"
        )
        raise AssertionError(_list_problems(headline, problems))
    return result


@contextlib.contextmanager
def _count_calls(model: nn.Module) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Count forwards and hooks of every module by name; undone at the end."""
    num_forwards = {name: 0 for name, _ in model.named_modules()}
    num_hooks = dict(num_forwards)
    with contextlib.ExitStack() as undo:
        for name, module in model.named_modules():
            _count_hooks(module, name, num_hooks, undo)
            _count_forwards(module, name, num_forwards, undo)
        yield num_forwards, num_hooks


def _count_hooks(module: nn.Module, name: str, counts: dict[str, int], undo: contextlib.ExitStack) -> None:
    def count(*_: Any) -> None:
        counts[name] += 1

    undo.callback(module.register_forward_pre_hook(count).remove)


def _count_forwards(module: nn.Module, name: str, counts: dict[str, int], undo: contextlib.ExitStack) -> None:
    forward = module.forward
    had_own = "forward" in vars(module)

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return forward(*args, **kwargs)

    module.forward = counted
    undo.callback(lambda: setattr(module, "forward", forward) if had_own else delattr(module, "forward"))


def _gather(value: Any) -> list[Any]:
    """Exchange a value; a rank that cannot pickle its own makes every rank raise."""
    import torch.distributed as dist

    try:
        message: tuple[bytes, str] = (pickle.dumps(value), "")
    except Exception as error:
        message = (b"", f"{type(error).__name__}: {error}")
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    if failed := [f"rank {rank}: {error}" for rank, (_, error) in enumerate(messages) if error]:
        raise TypeError(_list_problems("the value cannot be pickled", failed))
    return [pickle.loads(data) for data, _ in messages]


def _assert_same_tensors(tensors: Mapping[str, torch.Tensor | None], headline: str) -> None:
    """Exchange digests, then only the tensors whose digests differ; every rank takes the same branch."""
    __tracebackhide__ = True
    digests = _gather({name: _digest(tensor) for name, tensor in tensors.items()})
    if problem := _compare_names(digests):
        raise AssertionError(_list_problems(headline, problem))
    differing = [name for name in digests[0] if any(d[name] != digests[0][name] for d in digests)]
    if not differing:
        return
    shown = {name: tensors[name] for name in differing[:_NUM_SHOWN]}
    gathered = _gather({name: None if t is None else t.detach().cpu() for name, t in shown.items()})
    problems = [
        f"rank {rank}: {text}"
        for name in shown
        for rank, values in enumerate(gathered)
        for text in _explain_difference(gathered[0][name], values[name], name)
    ]
    raise AssertionError(_list_problems(f"{headline} ({len(differing)} of {len(tensors)})", problems))


def _digest(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "None"
    if hasattr(tensor, "placements"):
        raise ValueError("a sharded parameter (DTensor) has no replicas to compare; compare full_tensor() instead")
    import torch
    import xxhash

    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{tuple(tensor.shape)} {tensor.dtype} {xxhash.xxh3_64_hexdigest(data)}"


def _compare_names(records: list[dict[str, str]]) -> list[str]:
    first = set(records[0])
    return [
        f"rank {rank}: has {sorted(set(record) ^ first)[:_NUM_SHOWN]} where rank 0 does not, or the reverse"
        for rank, record in enumerate(records)
        if set(record) != first
    ]


def _explain_difference(first: Any, other: Any, where: str) -> list[str]:
    """Say how `other` differs from rank 0's value; empty if it does not."""
    import torch

    if isinstance(first, torch.Tensor) and isinstance(other, torch.Tensor):
        return _explain_tensor_difference(first, other, where)
    if type(first) is not type(other):
        return [f"{where} is {_show(other)}, rank 0 has {_show(first)}"]
    if isinstance(first, dict) and first.keys() == other.keys():
        return [text for key in first for text in _explain_difference(first[key], other[key], f"{where}[{key!r}]")]
    if isinstance(first, list | tuple) and len(first) == len(other):
        pairs = enumerate(zip(first, other, strict=True))
        return [text for i, (a, b) in pairs for text in _explain_difference(a, b, f"{where}[{i}]")]
    if first == other or (first != first and other != other):
        return []
    gap = f" (off by {abs(other - first):.6g})" if isinstance(first, int | float) else ""
    return [f"{where} is {_show(other)}, rank 0 has {_show(first)}{gap}"]


def _explain_tensor_difference(first: torch.Tensor, other: torch.Tensor, where: str) -> list[str]:
    import torch

    if first.shape != other.shape or first.dtype != other.dtype:
        shapes = (f"{tuple(t.shape)} {t.dtype}" for t in (other, first))
        return ["{} has shape {}, rank 0 has shape {}".format(where, *shapes)]
    if _digest(first) == _digest(other):
        return []
    gap = (other.to(torch.float64) - first.to(torch.float64)).abs()
    num_differing = int((first != other).sum())
    return [
        f"{where} differs from rank 0 by up to {gap.max().item():.6g} in {num_differing} of {gap.numel()} values"
    ]


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


def _list_problems(headline: str, problems: list[str]) -> str:
    more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
    return "\n  ".join([headline + ":", *problems[:20], *more])


def _name_ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
