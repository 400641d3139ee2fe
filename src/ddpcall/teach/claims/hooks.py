"""Claims about hooks on eager modules, in one process."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpcall.teach.claims.claim import Claim, Ruling, Verdict, require, times


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
    require(by_call == 3, "a call fires all three hooks")
    return Ruling(
        Verdict.TRUE if by_forward < by_call else Verdict.FALSE,
        f"of the model's own three hooks (forward-pre, forward, full-backward) model(x) fired {by_call} and "
        f"model.forward(x) {by_forward}",
    )


def judge_hooks_do_not_fire(seen: HookCounts) -> Ruling:
    """True if a direct forward fires fewer hooks, false if it fires all, depends if it matters whose they are."""
    require(
        seen.fired["call", "own"] == seen.fired["call", "child"] == 3, "a call fires all hooks, own and child's"
    )
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
    require(seen.inherited == 1, "the hook fires with the inherited __call__")
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
    require(seen.tensor_hooks_in_backward == 2, "both tensor hooks fire by the end of the backward")
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
        id="FM-8",
        text="hooks on modules or on tensors can look at and change data during the forward pass",
        first_look=Verdict.TRUE,
        experiment=change_data_in_hooks,
        judge=judge_hooks_change_data,
    ),
    Claim(
        id="CF-2",
        text="hooks before and after the forward do not fire on `model.forward(x)`",
        first_look=Verdict.DEPENDS,
        experiment=count_hooks,
        judge=judge_hooks_do_not_fire,
    ),
    Claim(
        id="TS-4",
        text="a hook of an eager module may run `module.forward(input)` and does not call itself",
        first_look=Verdict.TRUE,
        experiment=run_forward_inside_hook,
        judge=judge_no_recursion,
    ),
)
