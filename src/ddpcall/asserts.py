"""Asserts about the whole world: they compare ranks, and they fail on every rank together.

An ordinary `assert` that fails on rank 1 alone leaves rank 0 waiting in its next collective. Each function here
exchanges what the ranks have first and judges the same exchanged data on every rank, so all of them raise, or
none. All ranks must call them, in the same order, inside an initialized default process group.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpcall import torch_internals as internals
from ddpcall.compare import OneProcessComparison, same_as_one_process
from ddpcall.mixing import MixingMeasurement, measure_mixing
from ddpcall.replicas import digest_tensor
from ddpcall.taps import count_forwards, count_hook

_NUM_SHOWN = 5


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
    tensors: dict[str, Tensor | None] = dict(model.named_parameters())
    if buffers:
        tensors |= dict(model.named_buffers())
    _assert_same_tensors(tensors, "parameters differ between ranks")


def assert_gradients_synchronized(model: nn.Module) -> None:
    """Assert that every gradient is bit for bit the same on all ranks, and that there is one to compare.

    Give each rank its own data: with the same batch everywhere, gradients agree without any synchronization.

    Which of the two: this one looks at gradients after a backward, needs no optimizer, and accepts whatever all
    ranks agree on. `assert_gradients_averaged` goes around a whole training step and proves more: that each rank
    used the mean of all ranks' gradients, also where they are sharded, and not a sum, or a mean of some ranks.

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
    hint = "Usual cause: the forward went past the wrapper, as in model.module(x); write model(x)."
    _assert_same_tensors(gradients, "gradients differ between ranks", hint)


@contextmanager
def assert_gradients_averaged(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], *, timeout_s: float = 60.0
) -> Generator[MixingMeasurement]:
    """Assert that in the optimizer step of the block every rank used the mean of all ranks' gradients.

        with assert_gradients_averaged(model, optimizer):
            train_step(model, optimizer, batch)

    A common factor is allowed (clipping, a loss scale), and so are parameters that DDP was told to ignore. Give
    each rank its own data: equal batches prove nothing, and fail.

    Args:
        model: Wrapped or inner.
        optimizer: One, or all that step the model's parameters.
        timeout_s: Seconds to wait for other ranks at the end of the block.

    Yields:
        The measurement: after the block it has the attributes of `ddpcall.mixing.Mixing`.

    Raises:
        AssertionError: on every rank; shows the mixing matrix and says what its shape means.
        RuntimeError, ValueError: there is nothing to measure; see `ddpcall.measure_mixing`.
    """
    __tracebackhide__ = True
    with measure_mixing(model, optimizer, timeout_s=timeout_s) as mixing:
        yield mixing
    ignored = _names_ignored_by_ddp(model)
    counted = {shape for shape, names in mixing.by_parameter.items() if not ignored.issuperset(names)}
    is_averaged = counted & {"averaged", "scaled"} and not counted - {"averaged", "scaled", "unidentifiable"}
    if not is_averaged or mixing.shape not in {*mixing.by_parameter, "partly_local"}:
        raise AssertionError(f"not every rank used the mean of all ranks' gradients:\n{mixing}")


def assert_same_as_one_process(
    step: Callable[[Any, Any], Any], model: nn.Module, batch: Any, **options: Any
) -> OneProcessComparison:
    """Assert that a training step of all ranks computes what one process with the whole batch would.

        assert_same_as_one_process(step, model, batch)

    Args:
        step: `step(model, batch)`: forward, backward and what else happens before the optimizer; returns the loss.
        model: The plain module, the same on every rank.
        batch: The global batch, the same on every rank.
        **options: Those of `ddpcall.same_as_one_process`: `wrap`, `optimizer`, `steps`, `split`, `timeout_s`.

    Returns:
        The comparison.

    Raises:
        AssertionError: on every rank; says what differs first, and why where that can be told.
        RuntimeError, ValueError: there is nothing to compare; see `ddpcall.same_as_one_process`.
    """
    __tracebackhide__ = True
    result = same_as_one_process(step, model, batch, **options)
    if not result.same:
        raise AssertionError(f"the ranks do not compute what one process does ({result.cause}):\n{result.message}")
    return result


def _names_ignored_by_ddp(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in internals.IGNORED_BY_DDP.of(module, ())
    }


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
    names = [name for name, _ in model.named_modules()]
    forwards, differentiable, fired = ([_make_counter(model) for _ in names] for _ in range(3))
    with ExitStack() as stack:
        for index, module in enumerate(model.modules()):
            stack.callback(count_forwards(module, forwards[index], differentiable[index]))
            stack.callback(count_hook(module, "forward_pre", fired[index]))
        result = run(*args, **kwargs)
    silent = _find_silent(names, [int(count) for count in forwards], [int(count) for count in fired])
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


def _make_counter(model: nn.Module) -> Tensor:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return torch.zeros((), dtype=torch.int64, device=device)


def _find_silent(names: list[str], forwards: list[int], fired: list[int]) -> list[str]:
    """Name the modules whose forward ran without their hooks, and the model itself if it was passed by."""
    if not any(forwards):
        return ["(nothing: no forward ran)"]
    silent = [name for name, runs, hooks in zip(names, forwards, fired, strict=True) if runs > hooks]
    return silent if fired[0] or "" in silent else ["", *silent]


def _gather(value: Any) -> list[Any]:
    """Exchange a value; a rank that cannot pickle its own makes every rank raise."""
    try:
        message: tuple[bytes, str] = (pickle.dumps(value), "")
    except Exception as error:
        message = (b"", f"{type(error).__name__}: {error}")
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    if failed := [f"rank {rank}: {error}" for rank, (_, error) in enumerate(messages) if error]:
        raise TypeError(_list_problems("the value cannot be pickled", failed))
    return [pickle.loads(data) for data, _ in messages]


def _assert_same_tensors(tensors: Mapping[str, Tensor | None], headline: str, hint: str = "") -> None:
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
    text = _list_problems(f"{headline} ({len(differing)} of {len(tensors)})", problems)
    raise AssertionError(f"{text}\n{hint}" if hint else text)


def _digest(tensor: Tensor | None) -> str:
    if tensor is None:
        return "None"
    if hasattr(tensor, "placements"):
        raise ValueError("a sharded parameter (DTensor) has no replicas to compare; compare full_tensor() instead")
    return f"{tuple(tensor.shape)} {tensor.dtype} {digest_tensor(tensor)}"


def _compare_names(records: list[dict[str, str]]) -> list[str]:
    first = set(records[0])
    return [
        f"rank {rank}: has {sorted(set(record) ^ first)[:_NUM_SHOWN]} where rank 0 does not, or the reverse"
        for rank, record in enumerate(records)
        if set(record) != first
    ]


def _explain_difference(first: Any, other: Any, where: str) -> list[str]:
    """Say how `other` differs from rank 0's value; empty if it does not."""
    if isinstance(first, Tensor) and isinstance(other, Tensor):
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


def _explain_tensor_difference(first: Tensor, other: Tensor, where: str) -> list[str]:
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
