"""Claims about hooks on eager modules, in one process."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ddpcall.teach.claims.claim import claim, require, times, true_if, true_in_parts
from ddpcall.teach.question import DEPENDS, TRUE, Answer

KINDS = "forward-pre, forward, full-backward"


def count_hooks(module_class: type[nn.Module] = nn.Sequential) -> dict[str, Any]:
    """Register three hooks on a module and three on its child, and reach the module both ways."""
    fired = {}
    for path in ("call", "forward"):
        child = nn.Linear(2, 2)
        parent = module_class(child)
        firings: dict[str, set[str]] = {"own": set(), "child": set()}
        for whose, module in (("own", parent), ("child", child)):
            log = firings[whose]
            module.register_forward_pre_hook(lambda *_, log=log: log.add("forward-pre"))
            module.register_forward_hook(lambda *_, log=log: log.add("forward"))
            module.register_full_backward_hook(lambda *_, log=log: log.add("full-backward"))
        x = torch.ones(1, 2, requires_grad=True)
        (parent if path == "call" else parent.forward)(x).sum().backward()
        fired.update({(path, whose): len(log) for whose, log in firings.items()})
    return {"fired": fired}


@claim("FM-2", "a direct `forward` can miss hooks", TRUE, count_hooks)
def judge_can_skip_hooks(fired: dict[tuple[str, str], int]) -> Answer:
    """True if hooks that fire in a call do not all fire in a direct forward."""
    by_call, by_forward = fired["call", "own"], fired["forward", "own"]
    require(by_call == 3, "a call fires all three hooks")
    return Answer(
        true_if(by_forward < by_call),
        f"of the model's own three hooks ({KINDS}) model(x) fired {by_call} and model.forward(x) {by_forward}",
    )


@claim("CF-2", "hooks before and after the forward do not fire on `model.forward(x)`", DEPENDS, count_hooks)
def judge_hooks_do_not_fire(fired: dict[tuple[str, str], int]) -> Answer:
    """True if a direct forward fires fewer hooks, false if it fires all, depends if it matters whose they are."""
    require(fired["call", "own"] == fired["call", "child"] == 3, "a call fires all hooks, own and child's")
    return Answer(
        true_in_parts(fired["forward", whose] < fired["call", whose] for whose in ("own", "child")),
        f"model.forward(x) fired {fired['forward', 'own']} of three hooks on the model itself (model(x): "
        f"{fired['call', 'own']}) and {fired['forward', 'child']} of three on its child, which its forward calls "
        f"(model(x): {fired['call', 'child']})",
    )


def override_call() -> dict[str, Any]:
    """Count a forward hook on three modules: `__call__` inherited, written anew, and handing on to super."""

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

    return {"inherited": count(Inherited()), "own": count(Own()), "delegating": count(Delegating())}


@claim("FM-3", "a class that overrides `__call__` loses its hooks", TRUE, override_call)
def judge_override(inherited: int, own: int, delegating: int) -> Answer:
    """Depends if only one of the two overrides loses the hook."""
    require(inherited == 1, "the hook fires with the inherited __call__")
    return Answer(
        true_in_parts(fired < inherited for fired in (own, delegating)),
        f"of one call each, a forward hook fired {times(inherited)} with the inherited __call__, {times(own)} "
        f"with one that runs self.forward(x), and {times(delegating)} with one that ends in super().__call__(x)",
    )


def change_data_in_hooks() -> dict[str, Any]:
    """Double data in two module hooks, put two hooks on tensors and count what fired when."""
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
    scale = (output / plain).item()
    return {"scale": scale, "num_seen": len(seen), "in_forward": in_forward, "after_backward": len(fired)}


@claim(
    "FM-8",
    "hooks on modules or on tensors can look at and change data during the forward pass",
    TRUE,
    change_data_in_hooks,
)
def judge_hooks_change_data(scale: float, num_seen: int, in_forward: int, after_backward: int) -> Answer:
    """True if hooks of both kinds act during the forward, depends if only one kind does."""
    require(after_backward == 2, "both tensor hooks fire by the end of the backward")
    return Answer(
        true_in_parts((num_seen > 0 and abs(scale - 1) > 1e-3, in_forward > 0)),
        f"two module hooks saw {num_seen} tensors and made the output ×{scale:.3g}, but of two tensor hooks "
        f"{in_forward} fired during the forward, {after_backward} by the end of the backward",
    )


def run_forward_inside_hook(path: str = "forward", give_up_after: int = 50) -> dict[str, Any]:
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
    return {"hook_runs": len(entered), "difference": differences[0] if differences else None}


@claim(
    "TS-4",
    "a hook of an eager module may run `module.forward(input)` and does not call itself",
    TRUE,
    run_forward_inside_hook,
)
def judge_no_recursion(hook_runs: int, difference: float | None) -> Answer:
    """True if the hook ran once and could compute the module's output."""
    gave = "nothing" if difference is None else f"a result {difference:.3g} away from the output"
    return Answer(
        true_if(hook_runs == 1 and difference == 0),
        f"one call entered the hook {times(hook_runs)}, and running the module inside it gave {gave}",
    )
