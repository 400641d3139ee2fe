"""Claims about `forward` and data parallelism. Each experiment runs on two ranks, with other data on each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpcall.teach.claims.claim import claim, require, true_if, true_in_parts
from ddpcall.teach.question import DEPENDS, FALSE, Answer
from ddpcall.wrappers import WRAPPERS, apply_wrapper

SPELLINGS = {
    "m alone": "none",
    "m with a hook": "none",
    "DDP(m)": "ddp",
    "replicate(m)": "replicate",
    "fully_shard(m)": "fsdp2",
    "m.compile()": "compile_inplace",
    "torch.compile(m)": "compile",
}
ROUNDING = 1e-5


def wrap(spelling: str, model: nn.Module, compile_backend: Callable[..., Any] | str = "eager") -> nn.Module:
    """Prepare a model for training as a script would write it."""
    cpu = torch.device("cpu")
    return apply_wrapper(SPELLINGS[spelling], model, device=cpu, compile_backend=compile_backend).wrapped


def reach(wrapped: nn.Module, inner: nn.Module) -> dict[str, Callable[..., Any]]:
    """Return the ways to run a wrapped model by name."""
    return {"call": wrapped, "forward": wrapped.forward, "inner call": inner}


def count_all_reduces(spelling: str = "DDP(m)") -> dict[str, Any]:
    """Count all-reduces in the forward and the backward of one step, on each path, by torch's profiler."""
    issued, wrapped = {}, nn.Module()
    for path in ("call", "forward", "inner call"):
        inner = nn.Linear(3, 1)
        wrapped = wrap(spelling, inner)
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu) as forward:
            output = reach(wrapped, inner)[path](torch.randn(4, 3))
        with torch.profiler.profile(activities=cpu) as backward:
            output.sum().backward()
        for phase, profile in (("forward", forward), ("backward", backward)):
            issued[path, phase] = [event.name for event in profile.events() or ()].count("c10d::allreduce_")
    return {"issued": issued, "call_is_modules": type(wrapped).__call__ is nn.Module.__call__}


@claim("CF-5", "`__call__` does the all-reduce of gradients or parameters", FALSE, count_all_reduces, num_ranks=2)
def judge_call_reduces(issued: dict[tuple[str, str], int], call_is_modules: bool) -> Answer:
    """True if a call issues more all-reduces than a direct forward, false if as many."""
    total = {path: issued[path, "forward"] + issued[path, "backward"] for path, _ in issued}
    require(total["call"] > 0, "a step by call issues an all-reduce")
    return Answer(
        true_if(total["forward"] < total["call"]),
        f"all-reduces in one step: {total['call']} by wrapped(x), {total['forward']} by wrapped.forward(x), "
        f"{total['inner call']} by inner(x), which runs __call__ too; {issued['call', 'backward']} of those by "
        f"wrapped(x) in the backward{'; DDP.__call__ is nn.Module.__call__' if call_is_modules else ''}",
    )


class Net(nn.Module):
    """One layer, in a class of its own: dynamo leaves a bare nn.Linear alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def take_step(spelling: str, path: str) -> dict[str, Any]:
    """Take one step: count hooks and runs of compiled code, and compare the gradient with the average of ranks."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3) + dist.get_rank()
    (average,) = torch.autograd.grad(model(x).sum(), [model.linear.weight])
    dist.all_reduce(average)
    average /= dist.get_world_size()
    fired, compiled = [], []

    def count_compiled(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Tensor) -> Any:
            compiled.append("run")
            return graph.forward(*args)

        return run

    torch.compiler.reset()
    wrapped = wrap(spelling, model, count_compiled)
    if spelling == "m with a hook":
        wrapped.register_forward_hook(lambda *_: fired.append("hook"))
    error, raised = None, ""
    try:
        reach(wrapped, model)[path](x).sum().backward()
    except RuntimeError as failure:
        raised = type(failure).__name__
    else:
        gradient: Any = next(parameter.grad for parameter in wrapped.parameters())
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        error = (whole - average).abs().max()
        dist.all_reduce(error, op=dist.ReduceOp.MAX)
        error = error.item()
    return {"hooks": len(fired), "compiled": len(compiled), "error": error, "raised": raised}


def take_steps(spellings: tuple[str, ...] = ("DDP(m)", "replicate(m)")) -> dict[str, Any]:
    """Take one step on each path, and measure how far a gradient lies from the average of the ranks."""
    paths = [(spelling, path) for spelling in spellings for path in ("call", "forward", "inner call")]
    # Where a wrapper works in place there is no other module to call.
    distinct = [one for one in paths if one[1] != "inner call" or not WRAPPERS[SPELLINGS[one[0]]].in_place]
    return {"errors": {(spelling, path): take_step(spelling, path)["error"] for spelling, path in distinct}}


@claim(
    "CF-4",
    "under data parallelism, going past `__call__` leaves gradients unsynchronized",
    DEPENDS,
    take_steps,
    num_ranks=2,
    needs=("distributed._composable.replicate",),
)
def judge_skipping_call_loses_sync(errors: dict[tuple[str, str], float]) -> Answer:
    """True if every wrapper that syncs by call is local by forward, false if none is, depends otherwise."""
    synced = [spelling for (spelling, path), error in errors.items() if path == "call" and error < ROUNDING]
    require(bool(synced), "some wrapper synchronizes by call")
    listed = "; ".join(
        f"{spelling} {path} {'synced' if error < ROUNDING else f'off by {error:.3g}'}"
        for (spelling, path), error in errors.items()
    )
    return Answer(
        true_in_parts(errors[spelling, "forward"] > ROUNDING for spelling in synced),
        f"distance from the average of two ranks' gradients after one step: {listed}",
    )


def price_direct_forward(spellings: tuple[str, ...] = tuple(SPELLINGS)) -> dict[str, Any]:
    """Take the same step by call and by forward under every wrapper."""
    return {
        f"by_{path}": {spelling: take_step(spelling, path) for spelling in spellings}
        for path in ("call", "forward")
    }


def list_losses(call: dict[str, Any], forward: dict[str, Any]) -> list[str]:
    """Say what a step by forward lacks that the step by call has."""
    if forward["raised"]:
        return [f"raises {forward['raised']}"]
    losses = {
        f"gradients off by {forward['error']:.3g}": forward["error"] - call["error"] > ROUNDING,
        "runs eager": forward["compiled"] < call["compiled"],
        "hook skipped": forward["hooks"] < call["hooks"],
    }
    return [name for name, is_lost in losses.items() if is_lost]


@claim("CF-8", "never call `model.forward(x)`", DEPENDS, price_direct_forward, num_ranks=2)
def judge_never(by_call: dict[str, dict[str, Any]], by_forward: dict[str, dict[str, Any]]) -> Answer:
    """True if a direct forward costs something under every wrapper, false if under none, depends otherwise."""
    require(not any(step["raised"] for step in by_call.values()), "a step by call raises nothing")
    prices = {spelling: list_losses(by_call[spelling], by_forward[spelling]) for spelling in by_call}
    listed = "; ".join(f"{spelling}: {', '.join(losses) or 'nothing'}" for spelling, losses in prices.items())
    costly = sum(map(bool, prices.values()))
    return Answer(
        true_in_parts(map(bool, prices.values())),
        f"costs something under {costly} of {len(prices)} wrappers ({listed})",
    )
