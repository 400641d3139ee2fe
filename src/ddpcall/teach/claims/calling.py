"""Claims about what a call does that `module.forward(x)` does not: order, gradients, modes, names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ddpcall.teach.claims.claim import claim, require, times, true_if, true_in_parts
from ddpcall.teach.question import FALSE, TRUE, Answer


def look_for_forward_impl(name: str = "_forward_impl") -> dict[str, Any]:
    """Search every module class that torch has loaded for the name, and count the forwards that one call runs."""

    def subclasses(parent: type) -> set[type]:
        return {parent}.union(*(subclasses(child) for child in parent.__subclasses__()))

    runs = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            runs.append("forward")
            return x

    Net()(torch.ones(2))
    classes = {kind for kind in subclasses(nn.Module) if kind.__module__.startswith("torch.")}
    found = {f"{kind.__module__.split('.modules')[0]}.{kind.__name__}" for kind in classes if hasattr(kind, name)}
    return {
        "num_classes": len(classes),
        "with_it": sorted(found),
        "linear_has_it": hasattr(nn.Linear, name),
        "forwards_run": len(runs),
    }


@claim(
    "FI-1",
    "calling a module runs its `forward`, which typically hands the work to `_forward_impl`",
    FALSE,
    look_for_forward_impl,
)
def judge_delegation(num_classes: int, with_it: list[str], linear_has_it: bool, forwards_run: int) -> Answer:
    """True if a call runs `forward` and most classes delegate."""
    return Answer(
        true_if(forwards_run == 1 and len(with_it) > num_classes / 2),
        f"one call ran forward {times(forwards_run)}, and of the {num_classes} module classes that torch loads "
        f"{len(with_it)} have a _forward_impl ({', '.join(with_it[:3]) or 'none'})",
    )


@claim("FI-2", "`nn.Linear` has a `_forward_impl` inside", FALSE, look_for_forward_impl)
def judge_linear(num_classes: int, with_it: list[str], linear_has_it: bool, forwards_run: int) -> Answer:
    """True if nn.Linear has the attribute."""
    return Answer(
        true_if(linear_has_it),
        f"nn.Linear has {'a' if linear_has_it else 'no'} _forward_impl ({len(with_it)} of {num_classes} module "
        "classes of torch have the name)",
    )


def record_order(path: str = "call") -> dict[str, Any]:
    """Write down what runs when a module with two hooks is called; with path="forward", past `__call__`."""
    events: list[str] = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            events.append("forward")
            return x

    net = Net()
    net.register_forward_pre_hook(lambda *_: events.append("forward-pre hook"))
    net.register_forward_hook(lambda *_: events.append("forward hook"))
    (net if path == "call" else net.forward)(torch.ones(2))
    return {"events": events}


@claim("FM-1", "`model(x)` runs `__call__`, which sees to the hooks and runs `forward`", TRUE, record_order)
def judge_order(events: list[str]) -> Answer:
    """True if hooks ran around forward."""
    holds = events == ["forward-pre hook", "forward", "forward hook"]
    return Answer(true_if(holds), f"{len(events)} things ran, in this order: {', '.join(events)}")


def compare_gradients(grad_enabled: bool = True) -> dict[str, Any]:
    """Differentiate sum((x w)²) on every way to run a module; by hand, the gradient of w is 2 x w · x."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    x = torch.tensor([[0.5, 1.0, 2.0], [4.0, -1.0, 0.25]])
    errors, needs_grad = {}, {}
    paths: dict[str, Callable[[Net], Tensor]] = {
        "model(x)": lambda net: net(x),
        "model.forward(x)": lambda net: net.forward(x),
        "type(model).forward(model, x)": lambda net: type(net).forward(net, x),
        "functional_call(model, …)": lambda net: torch.func.functional_call(net, dict(net.named_parameters()), x),
    }
    for path, run in paths.items():
        net = Net()
        with torch.set_grad_enabled(grad_enabled):
            output = run(net)
        needs_grad[path] = output.requires_grad
        if output.requires_grad:
            output.square().sum().backward()
        by_hand = (2 * x * net.weight * x).sum(0)
        got = torch.zeros(3) if net.weight.grad is None else net.weight.grad
        errors[path] = (got - by_hand).abs().max().item()
    return {"errors": errors, "needs_grad": needs_grad}


@claim("FM-5", "`forward` needs no code for gradients", TRUE, compare_gradients)
def judge_no_gradient_code(errors: dict[str, float], needs_grad: dict[str, bool]) -> Answer:
    """True if every path gave the gradient derived by hand."""
    right = [error < 1e-6 for error in errors.values()]
    return Answer(
        true_in_parts(right),
        f"a forward of one multiplication got the gradient derived by hand on {sum(right)} of {len(right)} call "
        f"paths; the largest error is {max(errors.values()):.3g}",
    )


@claim("CF-1", "`__call__` sets up autograd, and `forward` goes past it", FALSE, compare_gradients)
def judge_call_sets_up_autograd(errors: dict[str, float], needs_grad: dict[str, bool]) -> Answer:
    """True if a call has gradients and a direct forward has none."""
    call, direct = "model(x)", "model.forward(x)"
    require(errors[call] < 1e-6, "model(x) has the right gradient")
    return Answer(
        true_if(errors[direct] >= 1e-6),
        f"requires_grad of the output: {needs_grad[call]} by call, {needs_grad[direct]} by forward; error against "
        f"the gradient derived by hand: {errors[call]:.3g} by call, {errors[direct]:.3g} by forward",
    )


def compare_modes(dropout_class: type[nn.Module] = nn.Dropout) -> dict[str, Any]:
    """Run BatchNorm and Dropout(0.5) in both modes by call and by forward; count updates and zeros."""
    torch.manual_seed(0)
    updates, zeroed = {}, {}
    for path in ("call", "forward"):
        for mode in ("train", "eval"):
            norm, dropout = nn.BatchNorm1d(4), dropout_class()
            x = torch.randn(1000, 4)
            norm.train(mode == "train")
            dropout.train(mode == "train")
            (norm if path == "call" else norm.forward)(x)
            dropped = (dropout if path == "call" else dropout.forward)(x)
            assert norm.num_batches_tracked is not None
            updates[path, mode] = int(norm.num_batches_tracked)
            zeroed[path, mode] = (dropped == 0).float().mean().item()
    return {"updates": updates, "zeroed": zeroed}


@claim("CF-3", "`__call__` is what makes BatchNorm and Dropout follow train and eval mode", FALSE, compare_modes)
def judge_modes(updates: dict[tuple[str, str], int], zeroed: dict[tuple[str, str], float]) -> Answer:
    """False if a direct forward follows the mode of both layers, true if it follows that of neither."""

    def follow(path: str) -> tuple[bool, bool]:
        is_dropping = zeroed[path, "train"] > 0.25 and zeroed[path, "eval"] == 0
        return updates[path, "train"] > 0 == updates[path, "eval"], is_dropping

    require(all(follow("call")), "by call BatchNorm and Dropout follow the mode")
    return Answer(
        true_in_parts(not follows for follows in follow("forward")),
        f"by forward alone BatchNorm updated its statistics {times(updates['forward', 'train'])} in train and "
        f"{times(updates['forward', 'eval'])} in eval mode, and Dropout(0.5) zeroed "
        f"{zeroed['forward', 'train']:.1%} in train and {zeroed['forward', 'eval']:.1%} in eval mode "
        f"(by call: {zeroed['call', 'train']:.1%} and {zeroed['call', 'eval']:.1%})",
    )
