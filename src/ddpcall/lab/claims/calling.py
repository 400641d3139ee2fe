"""Claims about what `module(x)` does that `module.forward(x)` does not, in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpcall.lab.claims.claim import Claim, Ruling, Verdict, times


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
class HookCounts:
    """How many of three hooks (forward-pre, forward, full-backward) fired, by (path, whose hook)."""

    fired: dict[tuple[str, str], int]


def count_hooks(module_class: type[nn.Module] = nn.Sequential) -> HookCounts:
    """Register three hooks on a module and three on its child, and reach the module both ways."""
    fired = {}
    for path in ("call", "forward"):
        child = nn.Linear(2, 2)
        parent = module_class(child)
        firings: dict[str, list[str]] = {"own": [], "child": []}
        for whose, module in (("own", parent), ("child", child)):
            log = firings[whose]
            module.register_forward_pre_hook(lambda *_, log=log: log.append("forward-pre"))
            module.register_forward_hook(lambda *_, log=log: log.append("forward"))
            module.register_full_backward_hook(lambda *_, log=log: log.append("full-backward"))
        x = torch.ones(1, 2, requires_grad=True)
        output = parent(x) if path == "call" else parent.forward(x)
        output.sum().backward()
        fired.update({(path, whose): len(set(log)) for whose, log in firings.items()})
    return HookCounts(fired)


def judge_can_skip_hooks(seen: HookCounts) -> Ruling:
    """True if hooks that fire in a call do not all fire in a direct forward."""
    by_call, by_forward = seen.fired["call", "own"], seen.fired["forward", "own"]
    return Ruling(
        Verdict.TRUE if by_forward < by_call else Verdict.FALSE,
        f"of the model's own three hooks (forward-pre, forward, full-backward) model(x) fired {by_call} and "
        f"model.forward(x) {by_forward}",
    )


def judge_hooks_do_not_fire(seen: HookCounts) -> Ruling:
    """True if a direct forward fires fewer hooks, false if it fires all, depends if it matters whose they are."""
    lost = [seen.fired["forward", whose] < seen.fired["call", whose] for whose in ("own", "child")]
    verdict = Verdict.TRUE if all(lost) else Verdict.DEPENDS if any(lost) else Verdict.FALSE
    return Ruling(
        verdict,
        f"model.forward(x) fired {seen.fired['forward', 'own']} of three hooks on the model itself (model(x): "
        f"{seen.fired['call', 'own']}) and {seen.fired['forward', 'child']} of three on its child, which its "
        "forward "
        f"calls (model(x): {seen.fired['call', 'child']})",
    )


@dataclass(frozen=True)
class OverriddenCall:
    """How often a forward hook fired, by how the class defines `__call__`."""

    inherited: int
    own: int
    delegating: int


def override_call() -> OverriddenCall:
    """Call three modules with a forward hook each: `__call__` inherited, written anew, and handing on to super."""

    class Inherited(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Own(Inherited):
        def __call__(self, x: Tensor) -> Tensor:
            return self.forward(x)

    class Delegating(Inherited):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x)

    def count(module: nn.Module) -> int:
        fired = []
        module.register_forward_hook(lambda *_: fired.append("hook"))
        module(torch.ones(2))
        return len(fired)

    return OverriddenCall(count(Inherited()), count(Own()), count(Delegating()))


def judge_override(seen: OverriddenCall) -> Ruling:
    """Depends if only one of the two overrides loses the hook."""
    lost = [fired < seen.inherited for fired in (seen.own, seen.delegating)]
    verdict = Verdict.TRUE if all(lost) else Verdict.DEPENDS if any(lost) else Verdict.FALSE
    return Ruling(
        verdict,
        f"of one call each, a forward hook fired {times(seen.inherited)} with the inherited __call__, "
        f"{times(seen.own)} "
        f"with one that runs self.forward(x), and {times(seen.delegating)} with one that ends in "
        "super().__call__(x)",
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
    return Ruling(
        Verdict.TRUE if call and not direct else Verdict.FALSE,
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


@dataclass(frozen=True)
class HookReach:
    """What hooks did while the forward ran, and what only the backward brought.

    Attributes:
        scale_by_module_hooks: The output against that without hooks; the two module hooks double it each.
        inputs_seen: How many tensors the module hooks were shown during the forward.
        tensor_hooks_in_forward: How many of the two tensor hooks had fired when the forward was done.
        tensor_hooks_in_backward: How many had fired after the backward.
    """

    scale_by_module_hooks: float
    inputs_seen: int
    tensor_hooks_in_forward: int
    tensor_hooks_in_backward: int


def change_data_in_hooks() -> HookReach:
    """Put hooks on a module and on tensors, and note what they did before and after the backward."""
    linear, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2, requires_grad=True)
    plain = linear(x).sum()
    seen: list[Any] = []

    def double_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        seen.append(inputs[0])
        return inputs[0] * 2

    def double_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output)
        return output * 2

    linear.register_forward_pre_hook(double_input)
    linear.register_forward_hook(double_output)
    fired = []
    x.register_hook(lambda gradient: fired.append("on an input"))
    linear.weight.register_hook(lambda gradient: fired.append("on a parameter"))
    output = linear(x).sum()
    in_forward = len(fired)
    output.backward()
    return HookReach((output / plain).item(), len(seen), in_forward, len(fired))


def judge_hooks_change_data(seen: HookReach) -> Ruling:
    """True if hooks of both kinds act during the forward, depends if only one kind does."""
    modules = seen.inputs_seen > 0 and abs(seen.scale_by_module_hooks - 1) > 1e-3
    tensors = seen.tensor_hooks_in_forward > 0
    verdict = Verdict.TRUE if modules and tensors else Verdict.DEPENDS if modules or tensors else Verdict.FALSE
    return Ruling(
        verdict,
        f"two module hooks saw {seen.inputs_seen} tensors and made the output "
        f"×{seen.scale_by_module_hooks:.3g}, but "
        f"of two tensor hooks {seen.tensor_hooks_in_forward} fired during the forward, "
        f"{seen.tensor_hooks_in_backward} by "
        "the end of the backward",
    )


@dataclass(frozen=True)
class SelfCall:
    """A forward hook that runs its module again.

    Attributes:
        hook_runs: How often the hook was entered in one call of the module.
        difference: Largest distance between what the hook computed and the module's output; None if it never did.
    """

    hook_runs: int
    difference: float | None


def run_forward_inside_hook(path: str = "forward", give_up_after: int = 50) -> SelfCall:
    """Run the module inside its own forward hook, by forward or by call."""
    linear, entered, differences = nn.Linear(2, 2), [], []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        entered.append("hook")
        if len(entered) > give_up_after:
            raise RecursionError("the hook calls itself")
        again = module.forward(*inputs) if path == "forward" else module(*inputs)
        differences.append((again - output).abs().max().item())

    linear.register_forward_hook(hook)
    with contextlib.suppress(RecursionError):
        linear(torch.ones(1, 2))
    return SelfCall(len(entered), differences[0] if differences else None)


def judge_no_recursion(seen: SelfCall) -> Ruling:
    """True if the hook ran once and could compute the module's output."""
    holds = seen.hook_runs == 1 and seen.difference == 0
    outcome = "nothing" if seen.difference is None else f"a result {seen.difference:.3g} away from the output"
    return Ruling(
        Verdict.TRUE if holds else Verdict.FALSE,
        f"one call entered the hook {times(seen.hook_runs)}, and running the module inside it gave {outcome}",
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
        id="FM-2",
        text="a direct `forward` can miss hooks",
        first_look=Verdict.TRUE,
        experiment=count_hooks,
        judge=judge_can_skip_hooks,
    ),
    Claim(
        id="FM-3",
        text="a class that overrides `__call__` loses its hooks",
        first_look=Verdict.TRUE,
        experiment=override_call,
        judge=judge_override,
    ),
    Claim(
        id="FM-5",
        text="`forward` needs no code for gradients",
        first_look=Verdict.TRUE,
        experiment=compare_gradients,
        judge=judge_no_gradient_code,
    ),
    Claim(
        id="FM-8",
        text="hooks on modules or on tensors can look at and change data during the forward pass",
        first_look=Verdict.TRUE,
        experiment=change_data_in_hooks,
        judge=judge_hooks_change_data,
    ),
    Claim(
        id="CF-1",
        text="`__call__` sets up autograd, and `forward` goes past it",
        first_look=Verdict.FALSE,
        experiment=compare_gradients,
        judge=judge_call_sets_up_autograd,
    ),
    Claim(
        id="CF-2",
        text="hooks before and after the forward do not fire on `model.forward(x)`",
        first_look=Verdict.DEPENDS,
        experiment=count_hooks,
        judge=judge_hooks_do_not_fire,
    ),
    Claim(
        id="CF-3",
        text="`__call__` is what makes BatchNorm and Dropout follow train and eval mode",
        first_look=Verdict.FALSE,
        experiment=compare_modes,
        judge=judge_modes,
    ),
    Claim(
        id="TS-4",
        text="a hook of an eager module may run `module.forward(input)` and does not call itself",
        first_look=Verdict.TRUE,
        experiment=run_forward_inside_hook,
        judge=judge_no_recursion,
    ),
)
