"""Claims about `forward` and data parallelism. Each experiment runs on two ranks, with other data on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpcall.teach.claims.claim import Claim, Ruling, Verdict, require

REPLICATE = ("distributed._composable.replicate",)


def wrap(wrapper: str, model: nn.Module, count_compiled: Callable[..., Any] | None = None) -> nn.Module:
    """Prepare a model for training in one of the ways people use."""
    wrapped: Any = model
    match wrapper:
        case "DDP(m)":
            wrapped = DistributedDataParallel(model)
        case "replicate(m)":
            from torch.distributed._composable.replicate import replicate

            wrapped = replicate(model)
        case "fully_shard(m)":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        case "torch.compile(m)":
            wrapped = torch.compile(model, backend=count_compiled or "eager")
        case "m.compile()":
            model.compile(backend=count_compiled or "eager")
    return wrapped


def largest_over_ranks(value: float) -> float:
    """Agree on the largest value any rank has."""
    shared = torch.tensor(value)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.item()


@dataclass(frozen=True)
class GradientSpread:
    """How far the gradients of two ranks lie apart after one backward, by (wrapper, path); 0 is synchronised."""

    differ_by: dict[tuple[str, str], float]


def compare_gradients_across_ranks(wrappers: tuple[str, ...] = ("DDP(m)", "replicate(m)")) -> GradientSpread:
    """Run one step by call and by forward of what the script holds, and by a call of the module under DDP."""
    differ_by = {}
    for wrapper in wrappers:
        for path in ("call", "forward", "inner call"):
            torch.manual_seed(0)
            inner = nn.Linear(3, 1)
            wrapped = wrap(wrapper, inner)
            if wrapped is inner and path == "inner call":
                continue  # this wrapper works in place: there is no other module to call
            run = {"call": wrapped, "forward": wrapped.forward, "inner call": inner}[path]
            x = torch.randn(4, 3) + dist.get_rank()
            run(x).square().mean().backward()
            gathered = [torch.empty_like(inner.weight) for _ in range(dist.get_world_size())]
            assert inner.weight.grad is not None
            dist.all_gather(gathered, inner.weight.grad)
            differ_by[wrapper, path] = max((other - gathered[0]).abs().max().item() for other in gathered)
    return GradientSpread(differ_by)


def judge_skipping_call_loses_sync(seen: GradientSpread) -> Ruling:
    """True if every wrapper that syncs by call is local by forward, false if none is, depends otherwise."""
    wrappers = [wrapper for (wrapper, path), spread in seen.differ_by.items() if path == "call" and spread == 0]
    require(bool(wrappers), "some wrapper synchronises by call")
    lost = [wrapper for wrapper in wrappers if seen.differ_by[wrapper, "forward"] > 0]
    verdict = Verdict.FALSE if not lost else Verdict.TRUE if len(lost) == len(wrappers) else Verdict.DEPENDS
    listed = "; ".join(
        f"{wrapper} {path} {'synced' if spread == 0 else f'differ by {spread:.3g}'}"
        for (wrapper, path), spread in seen.differ_by.items()
    )
    return Ruling(verdict, f"gradients of two ranks after one step: {listed}")


@dataclass(frozen=True)
class AllReduces:
    """All-reduces that one step issued, by (path, phase)."""

    issued: dict[tuple[str, str], int]
    call_is_modules: bool


def count_all_reduces(wrapper: str = "DDP(m)") -> AllReduces:
    """Profile the forward and the backward of one step, on each path."""
    issued, wrapped = {}, nn.Module()
    for path in ("call", "forward", "inner call"):
        inner = nn.Linear(3, 1)
        wrapped = wrap(wrapper, inner)
        run = {"call": wrapped, "forward": wrapped.forward, "inner call": inner}[path]
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu) as forward:
            output = run(torch.randn(4, 3))
        with torch.profiler.profile(activities=cpu) as backward:
            output.sum().backward()
        for phase, profile in (("forward", forward), ("backward", backward)):
            issued[path, phase] = [event.name for event in profile.events() or ()].count("c10d::allreduce_")
    return AllReduces(issued, type(wrapped).__call__ is nn.Module.__call__)


def judge_call_reduces(seen: AllReduces) -> Ruling:
    """True if a call issues more all-reduces than a direct forward, false if as many."""
    total = {path: seen.issued[path, "forward"] + seen.issued[path, "backward"] for path, _ in seen.issued}
    require(total["call"] > 0, "a step by call issues an all-reduce")
    return Ruling(
        Verdict.TRUE if total["forward"] < total["call"] else Verdict.FALSE,
        f"all-reduces in one step: {total['call']} by wrapped(x), {total['forward']} by wrapped.forward(x), "
        f"{total['inner call']} by inner(x), which runs __call__ too; {seen.issued['call', 'backward']} of "
        "those by "
        f"wrapped(x) in the backward{'; DDP.__call__ is nn.Module.__call__' if seen.call_is_modules else ''}",
    )


@dataclass(frozen=True)
class Step:
    """What one training step did.

    Attributes:
        hooks_fired: Forward hooks on the wrapped module.
        compiled_runs: Runs of compiled code.
        gradient_error: Largest distance from the gradient averaged over the ranks; None if there is no gradient.
        raised: The error's class, or "".
    """

    hooks_fired: int
    compiled_runs: int
    gradient_error: float | None
    raised: str


@dataclass(frozen=True)
class Price:
    """One training step by call and by forward, for each wrapper."""

    by_call: dict[str, Step]
    by_forward: dict[str, Step]


class Net(nn.Module):
    """One layer, in a class of its own: dynamo leaves a bare nn.Linear alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def take_step(wrapper: str, path: str, with_hook: bool) -> Step:
    """Take one step and hold its gradient against the true average over ranks."""
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
    wrapped = wrap(wrapper, model, count_compiled)
    if with_hook:
        wrapped.register_forward_hook(lambda *_: fired.append("hook"))
    try:
        output = wrapped(x) if path == "call" else wrapped.forward(x)
        output.sum().backward()
    except RuntimeError as error:
        return Step(len(fired), len(compiled), None, type(error).__name__)
    gradient: Any = next(parameter.grad for parameter in wrapped.parameters())
    whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return Step(len(fired), len(compiled), largest_over_ranks((whole - average).abs().max().item()), "")


WRAPPERS = (
    "m alone",
    "m with a hook",
    "DDP(m)",
    "replicate(m)",
    "fully_shard(m)",
    "m.compile()",
    "torch.compile(m)",
)


def price_direct_forward(wrappers: tuple[str, ...] = WRAPPERS) -> Price:
    """Take the same step by call and by forward under every wrapper."""
    with_hook = "m with a hook"
    by_path = [
        {wrapper: take_step(wrapper, path, wrapper == with_hook) for wrapper in wrappers}
        for path in ("call", "forward")
    ]
    return Price(*by_path)


def list_losses(by_call: Step, by_forward: Step) -> list[str]:
    """Say what a step by forward lacks that the step by call has."""
    losses = []
    if by_forward.raised and not by_call.raised:
        losses.append(f"raises {by_forward.raised}")
    if by_forward.gradient_error is not None and by_call.gradient_error is not None:
        further_off = by_forward.gradient_error - by_call.gradient_error
        if further_off > 1e-5:
            losses.append(f"gradients off by {by_forward.gradient_error:.3g}")
    if by_forward.compiled_runs < by_call.compiled_runs:
        losses.append("runs eager")
    if by_forward.hooks_fired < by_call.hooks_fired and not by_forward.raised:
        losses.append("hook skipped")
    return losses


def judge_never(seen: Price) -> Ruling:
    """True if a direct forward costs something under every wrapper, false if under none, depends otherwise."""
    prices = {wrapper: list_losses(seen.by_call[wrapper], seen.by_forward[wrapper]) for wrapper in seen.by_call}
    require(not any(step.raised for step in seen.by_call.values()), "a step by call raises nothing")
    costly = [wrapper for wrapper, losses in prices.items() if losses]
    verdict = Verdict.FALSE if not costly else Verdict.TRUE if len(costly) == len(prices) else Verdict.DEPENDS
    listed = "; ".join(f"{wrapper}: {', '.join(losses) or 'nothing'}" for wrapper, losses in prices.items())
    return Ruling(verdict, f"costs something under {len(costly)} of {len(prices)} wrappers ({listed})")


CLAIMS = (
    Claim(
        id="CF-4",
        text="under data parallelism, going past `__call__` leaves gradients unsynchronised",
        first_look=Verdict.DEPENDS,
        experiment=compare_gradients_across_ranks,
        judge=judge_skipping_call_loses_sync,
        num_ranks=2,
        needs=REPLICATE,
    ),
    Claim(
        id="CF-5",
        text="`__call__` does the all-reduce of gradients or parameters",
        first_look=Verdict.FALSE,
        experiment=count_all_reduces,
        judge=judge_call_reduces,
        num_ranks=2,
    ),
    Claim(
        id="CF-8",
        text="never call `model.forward(x)`",
        first_look=Verdict.DEPENDS,
        experiment=price_direct_forward,
        judge=judge_never,
        num_ranks=2,
    ),
)
