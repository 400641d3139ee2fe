"""Claims about what a call does that `module.forward(x)` does not: order, gradients, modes, names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpcall.teach.claims.claim import Claim, Ruling, Verdict, require, times


@dataclass(frozen=True)
class ForwardImpl:
    """Who has a `_forward_impl`, of the module classes that torch has loaded, and of those nn.Linear."""

    num_classes: int
    with_forward_impl: tuple[str, ...]
    linear_has_it: bool
    forwards_run_by_a_call: int


def look_for_forward_impl(name: str = "_forward_impl") -> ForwardImpl:
    """Search every module class that torch has loaded, and count the forwards that one call runs."""

    def subclasses(parent: type) -> set[type]:
        return {parent}.union(*(subclasses(child) for child in parent.__subclasses__()))

    runs = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            runs.append("forward")
            return x

    Net()(torch.ones(2))
    classes = {kind for kind in subclasses(nn.Module) if kind.__module__.startswith("torch.")}
    found = sorted({f"{kind.__module__}.{kind.__name__}" for kind in classes if hasattr(kind, name)})
    return ForwardImpl(len(classes), tuple(found), hasattr(nn.Linear, name), len(runs))


def judge_delegation(seen: ForwardImpl) -> Ruling:
    """True if a call runs `forward` and most classes delegate; false if it runs but few do."""
    typical = len(seen.with_forward_impl) > seen.num_classes / 2
    holds = seen.forwards_run_by_a_call == 1 and typical
    return Ruling(
        Verdict.TRUE if holds else Verdict.FALSE,
        f"one call ran forward {times(seen.forwards_run_by_a_call)}, and of the {seen.num_classes} module classes "
        f"that torch loads {len(seen.with_forward_impl)} have a _forward_impl "
        f"({', '.join(seen.with_forward_impl[:3]) or 'none'})",
    )


def judge_linear(seen: ForwardImpl) -> Ruling:
    """True if nn.Linear has the attribute."""
    has = "has" if seen.linear_has_it else "has no"
    return Ruling(
        Verdict.TRUE if seen.linear_has_it else Verdict.FALSE,
        f"nn.Linear {has} _forward_impl ({len(seen.with_forward_impl)} of {seen.num_classes} module classes of "
        "torch "
        "have the name)",
    )


@dataclass(frozen=True)
class Order:
    """What ran, in order."""

    events: tuple[str, ...]


def record_order(path: str = "call") -> Order:
    """Write down what runs when a module with two hooks is called; with path="forward", past `__call__`."""
    events: list[str] = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            events.append("forward")
            return x

    net = Net()
    net.register_forward_pre_hook(lambda *_: events.append("forward-pre hook"))
    net.register_forward_hook(lambda *_: events.append("forward hook"))
    x = torch.ones(2)
    if path == "call":
        net(x)
    else:
        net.forward(x)
    return Order(tuple(events))


def judge_order(seen: Order) -> Ruling:
    """True if hooks ran around forward."""
    expected = ("forward-pre hook", "forward", "forward hook")
    return Ruling(
        Verdict.TRUE if seen.events == expected else Verdict.FALSE,
        f"{len(seen.events)} things ran, in this order: {', '.join(seen.events)}",
    )


@dataclass(frozen=True)
class GradientErrors:
    """Largest distance between the gradient autograd gave and the one derived by hand, by call path."""

    by_path: dict[str, float]
    needs_grad: dict[str, bool]


def compare_gradients(grad_enabled: bool = True) -> GradientErrors:
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
    return GradientErrors(errors, needs_grad)


def judge_no_gradient_code(seen: GradientErrors) -> Ruling:
    """True if every path gave the gradient derived by hand."""
    right = [path for path, error in seen.by_path.items() if error < 1e-6]
    verdict = Verdict.TRUE if len(right) == len(seen.by_path) else Verdict.DEPENDS if right else Verdict.FALSE
    return Ruling(
        verdict,
        f"a forward of one multiplication got the gradient derived by hand on {len(right)} of "
        f"{len(seen.by_path)} call "
        f"paths; the largest error is {max(seen.by_path.values()):.3g}",
    )


def judge_call_sets_up_autograd(seen: GradientErrors) -> Ruling:
    """True if a call has gradients and a direct forward has none."""
    call, direct = (seen.by_path[path] < 1e-6 for path in ("model(x)", "model.forward(x)"))
    require(call, "model(x) has the right gradient")
    return Ruling(
        Verdict.FALSE if direct else Verdict.TRUE,
        f"requires_grad of the output: {seen.needs_grad['model(x)']} by call, "
        f"{seen.needs_grad['model.forward(x)']} by "
        f"forward; error against the gradient derived by hand: {seen.by_path['model(x)']:.3g} by call, "
        f"{seen.by_path['model.forward(x)']:.3g} by forward",
    )


@dataclass(frozen=True)
class Modes:
    """What BatchNorm and Dropout did, by (path, mode).

    Attributes:
        updates: How many times BatchNorm's running statistics were updated.
        zeroed: The share of values that Dropout(0.5) set to zero.
    """

    updates: dict[tuple[str, str], int]
    zeroed: dict[tuple[str, str], float]


def compare_modes(dropout_class: type[nn.Module] = nn.Dropout) -> Modes:
    """Run BatchNorm and Dropout in both modes, by call and by forward."""
    torch.manual_seed(0)
    updates, zeroed = {}, {}
    for path in ("call", "forward"):
        for mode in ("train", "eval"):
            norm, dropout = nn.BatchNorm1d(4), dropout_class()
            norm.train(mode == "train")
            dropout.train(mode == "train")
            x = torch.randn(1000, 4)
            if path == "call":
                norm(x)
                dropped = dropout(x)
            else:
                norm.forward(x)
                dropped = dropout.forward(x)
            assert norm.num_batches_tracked is not None
            updates[path, mode] = int(norm.num_batches_tracked)
            zeroed[path, mode] = (dropped == 0).float().mean().item()
    return Modes(updates, zeroed)


def judge_modes(seen: Modes) -> Ruling:
    """False if a direct forward follows the mode of both layers, true if it follows that of neither."""
    require(
        seen.updates["call", "train"] > 0 == seen.updates["call", "eval"], "by call BatchNorm follows the mode"
    )
    require(seen.zeroed["call", "train"] > 0.25 > seen.zeroed["call", "eval"], "by call Dropout follows the mode")
    norm_follows = seen.updates["forward", "train"] > 0 and seen.updates["forward", "eval"] == 0
    dropout_follows = seen.zeroed["forward", "train"] > 0.25 and seen.zeroed["forward", "eval"] == 0
    lost = [not norm_follows, not dropout_follows]
    verdict = Verdict.TRUE if all(lost) else Verdict.DEPENDS if any(lost) else Verdict.FALSE
    return Ruling(
        verdict,
        f"by forward alone BatchNorm updated its statistics {times(seen.updates['forward', 'train'])} in train "
        "and "
        f"{times(seen.updates['forward', 'eval'])} in eval mode, and Dropout(0.5) zeroed "
        f"{seen.zeroed['forward', 'train']:.1%} in train and {seen.zeroed['forward', 'eval']:.1%} in eval mode "
        "(by call: "
        f"{seen.zeroed['call', 'train']:.1%} and {seen.zeroed['call', 'eval']:.1%})",
    )


CLAIMS = (
    Claim(
        id="FI-1",
        text="calling a module runs its `forward`, which typically hands the work to `_forward_impl`",
        first_look=Verdict.FALSE,
        experiment=look_for_forward_impl,
        judge=judge_delegation,
    ),
    Claim(
        id="FI-2",
        text="`nn.Linear` has a `_forward_impl` inside",
        first_look=Verdict.FALSE,
        experiment=look_for_forward_impl,
        judge=judge_linear,
    ),
    Claim(
        id="FM-1",
        text="`model(x)` runs `__call__`, which sees to the hooks and runs `forward`",
        first_look=Verdict.TRUE,
        experiment=record_order,
        judge=judge_order,
    ),
    Claim(
        id="FM-5",
        text="`forward` needs no code for gradients",
        first_look=Verdict.TRUE,
        experiment=compare_gradients,
        judge=judge_no_gradient_code,
    ),
    Claim(
        id="CF-1",
        text="`__call__` sets up autograd, and `forward` goes past it",
        first_look=Verdict.FALSE,
        experiment=compare_gradients,
        judge=judge_call_sets_up_autograd,
    ),
    Claim(
        id="CF-3",
        text="`__call__` is what makes BatchNorm and Dropout follow train and eval mode",
        first_look=Verdict.FALSE,
        experiment=compare_modes,
        judge=judge_modes,
    ),
)
